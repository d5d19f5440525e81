//! The record of a session, as service/engram_service/store/record.py says.

pub const HEADER: usize = 64;
const MAGIC: u32 = 0x4D52_474E; // "NGRM"
const SCHEMA: u16 = 1;
const CHECKSUM: usize = HEADER / 8 - 1; // its place among the words

/// What all records of a call share.
pub struct Shared {
    pub fingerprint: u64,
    pub runtime: u8,
    pub state_nbytes: u32,
    pub commit_ms: u64,
}

/// What the header says of one session.
pub struct Place {
    pub seq: u64,
    pub acked: u64,
    pub epoch: u64,
    pub count: u32,
}

/// Writes a record whose length is a multiple of 8: `parts` follow the header, zeros follow them.
pub fn pack<'a>(
    record: &mut [u8],
    shared: &Shared,
    place: &Place,
    parts: impl Iterator<Item = &'a [u8]>,
    factors: &[u64],
) {
    let (header, mut body) = record.split_at_mut(HEADER);
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..6].copy_from_slice(&SCHEMA.to_le_bytes());
    header[6..8].copy_from_slice(&[0, shared.runtime]); // flags: none
    header[8..16].copy_from_slice(&shared.fingerprint.to_le_bytes());
    header[16..24].copy_from_slice(&place.seq.to_le_bytes());
    header[24..32].copy_from_slice(&place.acked.to_le_bytes());
    header[32..40].copy_from_slice(&place.epoch.to_le_bytes());
    header[40..44].copy_from_slice(&place.count.to_le_bytes());
    header[44..48].copy_from_slice(&shared.state_nbytes.to_le_bytes());
    header[48..56].copy_from_slice(&shared.commit_ms.to_le_bytes());
    for part in parts {
        let (place, rest) = body.split_at_mut(part.len());
        place.copy_from_slice(part);
        body = rest;
    }
    body.fill(0);
    let sum = checksum(record, factors);
    record[HEADER - 8..HEADER].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(record: &[u8], factors: &[u64]) -> u64 {
    let words = record.chunks_exact(8).zip(factors);
    words.fold(record.len() as u64, |sum, (word, factor)| {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        sum.wrapping_add(word.wrapping_mul(*factor))
    })
}

/// Odd constants (SplitMix64); 0 at the place of the checksum itself.
pub fn factors(count: usize) -> Vec<u64> {
    (0..count)
        .map(|place| {
            let mixed = (place as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            if place == CHECKSUM {
                0
            } else {
                (mixed ^ (mixed >> 31)) | 1
            }
        })
        .collect()
}
