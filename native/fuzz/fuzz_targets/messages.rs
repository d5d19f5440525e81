#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    engram_native::wire::fuzzing::messages(data);
});
