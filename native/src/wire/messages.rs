//! gRPC messages out of the bytes of a call: put together where DATA frames split them, and unpacked where they are compressed.

use bytes::{Buf, Bytes, BytesMut};
use flate2::read::GzDecoder;
use std::io::Read;

use super::frames::PREFIX;

/// Why a call ends whose messages cannot be read: a canonical status code, and words.
#[derive(Debug, PartialEq)]
pub struct Unreadable(pub u16, pub String);

/// The messages of one call.
pub struct Messages {
    data: BytesMut, // a message of which a part has come
    gzip: bool,     // the call's grpc-encoding
    most: usize,    // bytes of a message, compressed and not
}

impl Messages {
    pub fn new(gzip: bool, most: usize) -> Self {
        Messages {
            data: BytesMut::new(),
            gzip,
            most,
        }
    }

    /// Hands each message that is whole by now to `take`.
    pub fn feed(
        &mut self,
        mut chunk: Bytes,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), Unreadable> {
        if self.data.is_empty() {
            // The usual case: whole messages, which need not be copied.
            while let Some(length) = self.whole(&chunk)? {
                self.unpacked(&chunk[..length], &mut take)?;
                chunk.advance(length);
            }
            self.data.extend_from_slice(&chunk);
            return Ok(());
        }
        self.data.extend_from_slice(&chunk);
        while let Some(length) = self.whole(&self.data)? {
            let message = self.data.split_to(length);
            self.unpacked(&message, &mut take)?;
        }
        if self.data.is_empty() {
            self.data = BytesMut::new(); // a call that was large once does not stay so
        }
        Ok(())
    }

    /// Whether a message was begun and did not come to its end.
    pub fn cut(&self) -> bool {
        !self.data.is_empty()
    }

    /// The length of the message at the start of the data with its prefix, if all of it is there.
    fn whole(&self, data: &[u8]) -> Result<Option<usize>, Unreadable> {
        let Some((prefix, rest)) = data.split_at_checked(PREFIX) else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if length > self.most {
            return Err(self.too_large(&format!("has {length} bytes")));
        }
        Ok((rest.len() >= length).then_some(PREFIX + length))
    }

    fn unpacked(&self, message: &[u8], take: &mut impl FnMut(&[u8])) -> Result<(), Unreadable> {
        match (message[0], self.gzip) {
            (0, _) => take(&message[PREFIX..]),
            (1, true) => {
                let mut data = Vec::new();
                let most = self.most as u64 + 1;
                if GzDecoder::new(&message[PREFIX..])
                    .take(most)
                    .read_to_end(&mut data)
                    .is_err()
                {
                    return Err(Unreadable(13, "a message is not what gzip writes".into()));
                }
                if data.len() > self.most {
                    return Err(self.too_large("has more bytes when it is unpacked"));
                }
                take(&data);
            }
            (1, false) => {
                return Err(Unreadable(
                    13,
                    "a message is compressed, and the call names no encoding".into(),
                ));
            }
            _ => {
                return Err(Unreadable(
                    13,
                    "a message begins with neither 0 nor 1".into(),
                ));
            }
        }
        Ok(())
    }

    fn too_large(&self, what: &str) -> Unreadable {
        Unreadable(
            8,
            format!("a message {what}; at most {} are taken", self.most),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::prefixed;
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn compressed(message: &[u8]) -> Vec<u8> {
        let mut writer = GzEncoder::new(Vec::new(), Compression::fast());
        writer.write_all(message).unwrap();
        let mut data = prefixed(&writer.finish().unwrap()).to_vec();
        data[0] = 1;
        data
    }

    fn fed(messages: &mut Messages, data: &[u8], piece: usize) -> Result<Vec<Vec<u8>>, Unreadable> {
        let mut found = vec![];
        for chunk in data.chunks(piece) {
            messages.feed(Bytes::copy_from_slice(chunk), |message| {
                found.push(message.to_vec())
            })?;
        }
        Ok(found)
    }

    #[test]
    fn messages_are_the_same_however_they_are_split() {
        let wanted = vec![vec![], vec![7; 1], vec![8; 300], vec![9; 40]];
        let data: Vec<u8> = wanted
            .iter()
            .flat_map(|message| prefixed(message).to_vec())
            .collect();
        for piece in 1..data.len() + 1 {
            let mut messages = Messages::new(false, 1000);
            assert_eq!(
                fed(&mut messages, &data, piece).unwrap(),
                wanted,
                "in pieces of {piece}"
            );
            assert!(!messages.cut());
        }
        let mut messages = Messages::new(false, 1000);
        fed(&mut messages, &data[..data.len() - 1], 7).unwrap();
        assert!(messages.cut());
    }

    #[test]
    fn compressed_messages_are_unpacked_under_a_cap() {
        let data = compressed(&[3; 900]);
        assert_eq!(
            fed(&mut Messages::new(true, 1000), &data, 11).unwrap(),
            vec![vec![3; 900]]
        );
        assert_eq!(
            fed(&mut Messages::new(true, 899), &data, 11).unwrap_err().0,
            8
        );
        assert_eq!(
            fed(&mut Messages::new(false, 1000), &data, 11)
                .unwrap_err()
                .0,
            13
        );
        assert_eq!(
            fed(
                &mut Messages::new(true, 1 << 20),
                &compressed(&vec![0; 8 << 20]),
                1 << 20
            )
            .unwrap_err()
            .0,
            8
        );
        let mut broken = data.clone();
        broken[5] ^= 0xff;
        assert_eq!(
            fed(&mut Messages::new(true, 1000), &broken, 2000)
                .unwrap_err()
                .0,
            13
        );
    }

    #[test]
    fn a_length_that_lies_is_refused_before_its_bytes_come() {
        assert_eq!(
            fed(
                &mut Messages::new(false, 1000),
                &[0, 0xff, 0xff, 0xff, 0xff],
                5
            )
            .unwrap_err()
            .0,
            8
        );
        assert_eq!(
            fed(&mut Messages::new(false, 1000), &[2, 0, 0, 0, 0], 5)
                .unwrap_err()
                .0,
            13
        );
    }
}
