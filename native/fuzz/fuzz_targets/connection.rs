#![no_main]

use engram_native::wire::fuzzing::Peers;

thread_local! {
    static PEERS: Peers = Peers::default();
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    PEERS.with(|peers| peers.connection(data));
});
