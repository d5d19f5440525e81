//! Random numbers that a seed repeats (splitmix64), and random changes to bytes.

/// Numbers that change what they are written over: the ends of ranges, and lengths that lie.
const EDGES: [u32; 10] = [
    0,
    1,
    4,
    5,
    0x7f,
    0x80,
    0xff,
    0x4000,
    0x7fff_ffff,
    0xffff_ffff,
];

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is at least 1.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    pub fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Changes bytes in a few places.
    pub fn change(&mut self, data: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(data.len() + 1);
            let length = self.below(17).min(data.len() - at);
            match self.below(6) {
                0 if at < data.len() => data[at] ^= 1 << self.below(8),
                1 => drop(data.drain(at..at + length)),
                2 => {
                    let length = self.below(17);
                    let bytes = self.bytes(length);
                    drop(data.splice(at..at, bytes));
                }
                3 => {
                    let copy = data[at..at + length].to_vec();
                    let to = self.below(data.len() + 1);
                    drop(data.splice(to..to, copy));
                }
                4 => {
                    let edge = self.of(&EDGES).to_be_bytes();
                    for (byte, new) in data[at..].iter_mut().zip(edge) {
                        *byte = new;
                    }
                }
                _ if self.one_in(4) => data.truncate(at),
                _ => {}
            }
        }
    }
}
