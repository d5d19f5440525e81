//! The ids of calls.

use std::collections::VecDeque;

/// The ids of calls: a number of 20 bits, which is used again, and bits that count the uses. Python has columns by number.
#[derive(Default)]
pub struct Numbers {
    free: VecDeque<u32>, // ids that calls had, the longest unused first
    made: u32,           // number 0 is Python's own
}

const NUMBER_BITS: u32 = 20;
const ID_MAX: u32 = (1 << 31) - 1;
const FREE_MIN: usize = 1024; // unused, before one is used again

impl Numbers {
    pub fn take(&mut self) -> u32 {
        if (self.free.len() > FREE_MIN || self.made + 1 >= 1 << NUMBER_BITS)
            && let Some(id) = self.free.pop_front()
        {
            return (id + (1 << NUMBER_BITS)) & ID_MAX;
        }
        self.made += 1;
        self.made
    }

    pub fn give_back(&mut self, id: u32) {
        self.free.push_back(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_again_late_and_under_another_id() {
        let mut numbers = Numbers::default();
        let ids: Vec<u32> = (0..2000).map(|_| numbers.take()).collect();
        assert!(ids.iter().all(|id| *id > 0), "number 0 is nobody's");
        for id in &ids[..1100] {
            numbers.give_back(*id);
        }
        let again = numbers.take();
        assert_eq!(again & ((1 << NUMBER_BITS) - 1), ids[0]);
        assert!(!ids.contains(&again));
        numbers.give_back(ID_MAX);
        assert!(numbers.take() <= ID_MAX);
    }
}
