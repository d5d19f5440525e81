//! The half of a call that reads: its messages go to the inbox, no faster than they are taken from there.

use h2::RecvStream;
use std::sync::atomic::Ordering;

use super::Call;
use crate::wire::frames::{self, Steps};
use crate::wire::inbox::{Begun, Happening};
use crate::wire::messages::{Messages, Unreadable};
use crate::wire::server::Server;

/// What becomes of what a caller sends.
pub enum Reading {
    /// Frames of steps are rows, other messages are events.
    Stream,
    /// Messages are events.
    Messages,
    /// The one message is a row or an event when all is there.
    Step(Box<Begun>),
}

impl Call {
    /// Returns at the end of what the caller sends. Err: why it makes no sense; None: the caller has gone.
    pub(super) async fn read(
        &self,
        server: &Server,
        mut body: RecvStream,
        mut messages: Messages,
        reading: Reading,
    ) -> Result<(), Option<Unreadable>> {
        let inbox = &server.inbox;
        let (mut one, mut count) = (vec![], 0); // of a call that has one message
        let mut since = 0; // when the first bytes of the message that comes were read
        loop {
            // Whoever has too much under way is read no further, and its window closes.
            self.room().await;
            inbox.room().await;
            let Some(chunk) = body.data().await else {
                break;
            };
            let chunk = chunk.map_err(|_| None)?;
            let (length, read) = (chunk.len(), self.times.read());
            if !messages.cut() {
                since = read;
            }
            messages.feed(chunk, |message| {
                if let Reading::Step(_) = reading {
                    count += 1;
                    if count == 1 {
                        one = message.to_vec();
                    }
                    return;
                }
                let stream = matches!(reading, Reading::Stream);
                match if stream { self.steps(message) } else { None } {
                    Some(steps) => {
                        self.expect(steps.rows() as i64);
                        inbox.push_steps(self.id, &steps, since);
                    }
                    None => inbox.push(self.id, Happening::Message(message.to_vec())),
                }
                since = read;
            })?;
            if count > 1 {
                return Err(Some(Unreadable(
                    13,
                    "this call has one message, and more have come".into(),
                )));
            }
            let _ = body.flow_control().release_capacity(length);
        }
        if messages.cut() {
            return Err(Some(Unreadable(
                13,
                "the call ends within a message".into(),
            )));
        }
        match reading {
            Reading::Step(_) if count == 0 => {
                return Err(Some(Unreadable(
                    13,
                    "this call has one message, and none has come".into(),
                )));
            }
            Reading::Step(begun) => self.step(server, begun, one, since),
            _ => inbox.push(self.id, Happening::HalfClose),
        }
        Ok(())
    }

    /// The rows that a message is, where it is a frame of steps like most.
    fn steps<'a>(&self, message: &'a [u8]) -> Option<Steps<'a>> {
        if message.len() > self.frame_nbytes {
            return None;
        }
        frames::steps(message).filter(|steps| steps.rows() <= self.frame_rows)
    }

    async fn room(&self) {
        loop {
            let answered = self.answered.notified();
            if self.rows.load(Ordering::Relaxed) < self.rows_max {
                return;
            }
            answered.await;
        }
    }
}
