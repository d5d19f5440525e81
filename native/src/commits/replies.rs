//! What Redis answers to a commit, read as it comes: one reply a row, then that to the command that counts, then that to the one
//! that waits for copies. Whatever else comes is an error of the connection, for then nobody knows what answers what.

const LINE: usize = 64 << 10; // no line is longer
const NUMBERS: usize = 16; // of an array; WAITAOF answers with two
const OK: &[u8] = b"+OK\r\n";

pub const WRITTEN: u8 = b'+';
pub const MISSING: u8 = b'0';
pub const ERROR: u8 = b'-';

/// The replies to the commit under way, those that are still to come included.
#[derive(Default)]
pub struct Replies {
    rows: usize,
    counts: bool,
    waits: bool,
    taken: usize,
    kinds: Vec<u8>, // of the rows up to the last that is not WRITTEN
    errors: Vec<(usize, Vec<u8>)>,
    counter: Option<i64>,
    waited: Vec<i64>,
    waiting: Option<usize>, // numbers of the array under way that are to come
}

/// What became of a commit.
pub struct Verdicts {
    /// One byte a row; None where all are WRITTEN.
    pub kinds: Option<Vec<u8>>,
    /// Of each row with an ERROR, without its minus sign.
    pub errors: Vec<(usize, Vec<u8>)>,
    /// None: nothing counted, or it was refused.
    pub counter: Option<i64>,
    /// The numbers in the reply to the command that waits.
    pub waited: Vec<i64>,
}

impl Replies {
    pub fn expect(&mut self, rows: usize, counts: bool, waits: bool) {
        self.rows += rows;
        self.counts |= counts;
        self.waits |= waits;
    }

    /// Whether a command other than a row's is among those that were sent: no row can follow it.
    pub fn sealed(&self) -> bool {
        self.counts || self.waits
    }

    fn expected(&self) -> usize {
        self.rows + usize::from(self.counts) + usize::from(self.waits)
    }

    /// How many replies are to come.
    pub fn left(&self) -> usize {
        self.expected() - self.taken
    }

    /// Whether every row whose reply is there was written.
    pub fn all_written(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Takes what is whole of `data`, and says how much that was. An error says in words what is wrong with the rest.
    pub fn take(&mut self, data: &[u8]) -> Result<usize, String> {
        let mut at = 0;
        while at < data.len() {
            if self.taken < self.rows && data[at..].starts_with(OK) {
                self.taken += 1;
                at += OK.len();
                continue;
            }
            if self.left() == 0 {
                return Err("more replies than commands".into());
            }
            let Some(line) = line(&data[at..])? else {
                break;
            };
            at += line.len() + 2;
            if self.taken < self.rows {
                self.row(line)?;
            } else if self.counts && self.taken == self.rows {
                self.counted(line)?;
            } else {
                self.waited(line)?;
            }
        }
        Ok(at)
    }

    fn row(&mut self, line: &[u8]) -> Result<(), String> {
        let kind = match line {
            b"+OK" => WRITTEN,
            b"$-1" | b"_" | b"*-1" => MISSING,
            [b'-', text @ ..] => {
                self.errors.push((self.taken, text.to_vec()));
                ERROR
            }
            _ => return Err(unexpected("SET", line)),
        };
        if kind != WRITTEN {
            self.kinds.resize(self.taken, WRITTEN);
            self.kinds.push(kind);
        }
        self.taken += 1;
        Ok(())
    }

    fn counted(&mut self, line: &[u8]) -> Result<(), String> {
        self.counter = match line {
            [b':', digits @ ..] => {
                Some(number(digits).ok_or_else(|| unexpected("the counter", line))?)
            }
            [b'-', ..] => None,
            _ => return Err(unexpected("the counter", line)),
        };
        self.taken += 1;
        Ok(())
    }

    fn waited(&mut self, line: &[u8]) -> Result<(), String> {
        let wrong = || unexpected("the wait for copies", line);
        match (line, self.waiting) {
            ([b':', digits @ ..], waiting) => {
                self.waited.push(number(digits).ok_or_else(wrong)?);
                self.waiting = waiting.map(|left| left - 1);
            }
            ([b'*', digits @ ..], None) => {
                let count = number(digits)
                    .and_then(|count| usize::try_from(count).ok())
                    .ok_or_else(wrong)?;
                if !(1..=NUMBERS).contains(&count) {
                    return Err(wrong());
                }
                self.waiting = Some(count);
            }
            _ => return Err(wrong()),
        }
        if self.waiting.is_none_or(|left| left == 0) {
            self.taken += 1;
        }
        Ok(())
    }

    /// Of a commit whose replies are all there; the next one begins.
    pub fn verdicts(&mut self) -> Verdicts {
        let mut over = std::mem::take(self);
        if !over.kinds.is_empty() {
            over.kinds.resize(over.rows, WRITTEN);
        }
        Verdicts {
            kinds: (!over.kinds.is_empty()).then_some(over.kinds),
            errors: over.errors,
            counter: over.counter,
            waited: over.waited,
        }
    }
}

/// The first line without its end, if it is whole.
fn line(data: &[u8]) -> Result<Option<&[u8]>, String> {
    let Some(end) = data.iter().take(LINE).position(|&byte| byte == b'\n') else {
        return if data.len() < LINE {
            Ok(None)
        } else {
            Err("a line without an end".into())
        };
    };
    match data[..end].split_last() {
        Some((b'\r', line)) => Ok(Some(line)),
        _ => Err(unexpected("a command", &data[..end])),
    }
}

fn number(digits: &[u8]) -> Option<i64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn unexpected(to: &str, line: &[u8]) -> String {
    let shown = &line[..line.len().min(200)];
    format!("the reply to {to} was {}", shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expecting(rows: usize, counts: bool, waits: bool) -> Replies {
        let mut replies = Replies::default();
        replies.expect(rows, counts, waits);
        replies
    }

    /// Takes parts as they would come from a socket, what is not whole kept.
    fn all(replies: &mut Replies, parts: &[&[u8]]) -> Result<Verdicts, String> {
        let mut kept = Vec::new();
        for part in parts {
            kept.extend_from_slice(part);
            let used = replies.take(&kept)?;
            kept.drain(..used);
        }
        match (replies.left(), kept.len()) {
            (0, 0) => Ok(replies.verdicts()),
            (left, kept) => Err(format!("{left} replies and {kept} bytes are left")),
        }
    }

    const MIXED: &[u8] =
        b"+OK\r\n$-1\r\n-MOVED 1 a:2\r\n+OK\r\n_\r\n+OK\r\n:17\r\n*2\r\n:1\r\n:0\r\n";

    fn check_mixed(verdicts: Verdicts) {
        assert_eq!(verdicts.kinds.as_deref(), Some(b"+0-+0+".as_slice()));
        assert_eq!(verdicts.errors, [(2, b"MOVED 1 a:2".to_vec())]);
        assert_eq!(verdicts.counter, Some(17));
        assert_eq!(verdicts.waited, [1, 0]);
    }

    #[test]
    fn replies_may_be_cut_anywhere() {
        for one in 0..=MIXED.len() {
            for two in one..=MIXED.len() {
                let parts = [&MIXED[..one], &MIXED[one..two], &MIXED[two..]];
                let mut replies = expecting(6, true, true);
                check_mixed(all(&mut replies, &parts).unwrap());
            }
        }
        let bytes: Vec<&[u8]> = MIXED.chunks(1).collect();
        check_mixed(all(&mut expecting(6, true, true), &bytes).unwrap());
    }

    #[test]
    fn what_is_all_right_needs_no_list() {
        let verdicts = all(&mut expecting(3, false, false), &[b"+OK\r\n+OK\r\n+OK\r\n"]).unwrap();
        assert!(verdicts.kinds.is_none() && verdicts.errors.is_empty());
        assert_eq!((verdicts.counter, verdicts.waited), (None, vec![]));
        let verdicts = all(&mut expecting(0, false, true), &[b":2\r\n"]).unwrap();
        assert_eq!(verdicts.waited, [2]);
    }

    #[test]
    fn a_counter_may_be_refused() {
        let verdicts = all(&mut expecting(1, true, false), &[b"+OK\r\n-OOM no\r\n"]).unwrap();
        assert_eq!(verdicts.counter, None);
    }

    #[test]
    fn a_second_commit_begins_anew() {
        let mut replies = expecting(6, true, true);
        all(&mut replies, &[MIXED]).unwrap();
        assert!(!replies.sealed());
        replies.expect(1, true, false);
        let verdicts = all(&mut replies, &[b"+OK\r\n:18\r\n"]).unwrap();
        assert_eq!((verdicts.kinds, verdicts.counter), (None, Some(18)));
    }

    #[test]
    fn what_answers_nothing_is_an_error() {
        for wrong in [
            b":1\r\n".as_slice(),
            b"$2\r\nab\r\n",
            b"*0\r\n",
            b"\r\n",
            b"\n",
            b"+OK\n",
            b"+QUEUED\r\n",
            b">1\r\n+a\r\n",
            b"+OK\r\n:\r\n",
            b"+OK\r\n:1x\r\n",
            b"+OK\r\n:99999999999999999999\r\n",
            b"+OK\r\n+OK\r\n",
            b"+OK\r\n:1\r\n-ERR unknown command\r\n",
            b"+OK\r\n:1\r\n*-1\r\n",
            b"+OK\r\n:1\r\n*0\r\n",
            b"+OK\r\n:1\r\n*17\r\n",
            b"+OK\r\n:1\r\n*2\r\n*1\r\n",
            b"+OK\r\n:1\r\n*9223372036854775807\r\n",
            b"+OK\r\n:1\r\n:1\r\n+OK\r\n",
        ] {
            let ended = all(&mut expecting(1, true, true), &[wrong]);
            assert!(ended.is_err(), "{}", wrong.escape_ascii());
        }
        let endless = vec![b'-'; LINE];
        assert!(expecting(1, false, false).take(&endless).is_err());
        assert_eq!(expecting(1, false, false).take(&endless[1..]), Ok(0));
    }

    /// The same numbers everywhere (SplitMix64).
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((mixed ^ (mixed >> 31)) % end as u64) as usize
        }
    }

    #[test]
    fn random_bytes_end_in_an_error() {
        let mut random = Random(1);
        let alphabet = b"+-:$*_>OK0123456789\r\n\r\n ab\0\xff";
        for round in 0..30_000 {
            let mut data: Vec<u8> = if round % 2 == 0 {
                (0..random.below(300))
                    .map(|_| alphabet[random.below(alphabet.len())])
                    .collect()
            } else {
                let mut data = MIXED.to_vec();
                for _ in 0..1 + random.below(4) {
                    let at = random.below(data.len());
                    data[at] = random.below(256) as u8;
                }
                data
            };
            if round % 2 == 0 {
                data.extend_from_slice(b"!\r\n"); // no reply begins so: without it, some wait for more
            }
            let cut = random.below(data.len());
            let ended = all(&mut expecting(6, true, true), &[&data[..cut], &data[cut..]]);
            if round % 2 == 0 {
                assert!(ended.is_err(), "{}", data.escape_ascii());
            } // else a changed number or a changed letter of an error may be as good
        }
    }
}
