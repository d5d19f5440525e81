//! How often something may happen.

use tokio::time::Instant;

/// So many a second, and as many at once.
pub struct Allowance {
    each_s: f64,
    left: f64,
    seen: usize,
    at: Instant,
}

impl Allowance {
    pub fn new(each_s: usize) -> Self {
        Allowance {
            each_s: each_s as f64,
            left: each_s as f64,
            seen: 0,
            at: Instant::now(),
        }
    }

    /// Whether so many in all are no more than allowed until now.
    pub fn allows(&mut self, count: usize, now: Instant) -> bool {
        let since = now.duration_since(self.at).as_secs_f64() * self.each_s;
        self.left = (self.left + since).min(self.each_s) - (count - self.seen) as f64;
        (self.seen, self.at) = (count, now);
        self.left >= 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn as_many_at_once_as_in_a_second_and_then_at_their_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::new(10);
        assert!(allowance.allows(10, start));
        assert!(allowance.allows(15, start + Duration::from_millis(500)));
        assert!(!allowance.allows(16, start + Duration::from_millis(501)));
        assert!(allowance.allows(17, start + Duration::from_secs(60)));
        assert!(!allowance.allows(28, start + Duration::from_secs(60)));
    }
}
