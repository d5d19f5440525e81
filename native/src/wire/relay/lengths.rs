//! How long messages are, read as they pass, and nothing else of them.

use crate::wire::frames::PREFIX;
use crate::wire::status::Status;

/// Reads the prefixes of the messages that pass.
pub struct Lengths {
    prefix: [u8; PREFIX],
    read: usize, // of the prefix
    left: usize, // of the message
    most: usize,
}

impl Lengths {
    pub fn new(most: usize) -> Self {
        Lengths {
            prefix: [0; PREFIX],
            read: 0,
            left: 0,
            most,
        }
    }

    pub fn feed(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            let skipped = self.left.min(data.len());
            self.left -= skipped;
            data = &data[skipped..];
            let part = (PREFIX - self.read).min(data.len());
            self.prefix[self.read..self.read + part].copy_from_slice(&data[..part]);
            self.read += part;
            data = &data[part..];
            if self.read == PREFIX {
                let [_, length @ ..] = self.prefix;
                (self.read, self.left) = (0, u32::from_be_bytes(length) as usize);
                if self.left > self.most {
                    let (length, most) = (self.left, self.most);
                    let why = format!("a message has {length} bytes; at most {most} are taken");
                    return Err(Status::new(8, why));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frames::prefixed;

    #[test]
    fn lengths_are_read_however_the_bytes_are_split() {
        let sizes = [0, 1, 300, 0, 1000, 5];
        let data: Vec<u8> = sizes
            .iter()
            .flat_map(|size| prefixed(&vec![255; *size]).to_vec())
            .collect();
        for piece in 1..data.len() + 1 {
            for (most, fits) in [(1000, true), (999, false)] {
                let mut lengths = Lengths::new(most);
                let fed = data
                    .chunks(piece)
                    .try_for_each(|chunk| lengths.feed(chunk))
                    .is_ok();
                assert_eq!(fed, fits, "in pieces of {piece}");
            }
        }
    }
}
