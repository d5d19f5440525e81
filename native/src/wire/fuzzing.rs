//! For native/fuzz: what reads bytes from outside, and what must hold whatever the bytes are.

use bytes::Bytes;
use http::HeaderMap;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, copy, duplex, sink, split};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use super::frames::{self, prefixed};
use super::inbox::{Columns, Happening, Inbox, Noted};
use super::messages::{Messages, Unreadable};
use super::refusals::Refusals;
use super::requests::{Model, request};
use super::server::{self, Limits, Server};
use super::status::Status;
use super::times::{self, Answer, Written};

const MESSAGE_NBYTES: usize = 4096;
const SOCKET_NBYTES: usize = 1 << 16;
const END: Duration = Duration::from_secs(20); // of what is to end at once; the machine may be busy

/// A StreamRequest: what is read as steps fills columns that fit together. How many rows there were. Or a StepRequest, whose input
/// is one row of a model or none.
pub fn steps(data: &[u8]) -> usize {
    static MODEL: LazyLock<Model> = LazyLock::new(|| {
        let name = ("m".to_owned(), "1".to_owned());
        Model::new(name, (16, true), (16, true), &[1, 4])
    });
    if let Some(found) = request(data) {
        assert!(MODEL.input(&found).is_none_or(|input| input.len() == 16));
        return 1;
    }
    static INBOX: LazyLock<Inbox> = LazyLock::new(|| Inbox::new(1 << 30).expect("a pipe"));
    let Some(found) = frames::steps(data) else {
        return 0;
    };
    let mut columns = Columns::default();
    INBOX.push_steps(1, &found, 0);
    let (_, noted) = INBOX.take(&mut columns);
    assert!(noted.is_empty());
    fit(&columns);
    assert_eq!(columns.len(), found.rows());
    assert_eq!(columns.inputs, found.inputs);
    found.rows()
}

fn fit(columns: &Columns) {
    let rows = columns.len();
    assert_eq!(columns.handles.len(), rows);
    assert_eq!(columns.seqs.len(), rows);
    assert_eq!(columns.acknowledged.len(), rows);
    assert_eq!(columns.flags.len(), rows);
    assert_eq!(columns.timeouts_ms.len(), rows);
    let lengths = columns.input_nbytes.iter().map(|length| *length as usize);
    assert_eq!(lengths.sum::<usize>(), columns.inputs.len());
    assert_eq!(columns.input_nbytes.len(), rows);
    assert_eq!(columns.times.len(), rows);
}

/// The bytes of a call, the first two apart: they give the same messages, or the same refusal, however they are split, and none is
/// larger than allowed. How many there were.
pub fn messages(data: &[u8]) -> usize {
    let Some(([how, piece], data)) = data.split_first_chunk() else {
        return 0;
    };
    let gzip = how & 1 == 1;
    let piece = usize::from(*piece) + 1;
    let whole = fed(data, gzip, data.len().max(1));
    assert_eq!(whole, fed(data, gzip, piece));
    whole.0.len()
}

fn fed(data: &[u8], gzip: bool, piece: usize) -> (Vec<Vec<u8>>, Result<bool, Unreadable>) {
    let mut messages = Messages::new(gzip, MESSAGE_NBYTES);
    let mut found = vec![];
    for chunk in data.chunks(piece) {
        let taken = messages.feed(Bytes::copy_from_slice(chunk), |message| {
            assert!(message.len() <= MESSAGE_NBYTES);
            found.push(message.to_vec());
        });
        if let Err(unreadable) = taken {
            return (found, Err(unreadable));
        }
    }
    (found, Ok(messages.cut()))
}

/// A server whose peers send whatever they like, over sockets in memory.
pub struct Peers {
    runtime: Runtime,
    server: Arc<Server>,
}

impl Default for Peers {
    fn default() -> Self {
        let limits = Limits {
            connections: 1,
            calls: 8,
            header_nbytes: 4096,
            message_nbytes: MESSAGE_NBYTES,
            rows: 16,
            inbox_nbytes: 1 << 16,
            handshake_s: 5.0,
            step_s: 30.0,
            idle_s: 60.0,
            keepalive_s: 60.0,
            resets: 20,
            frame_rows: 16,
            frame_nbytes: MESSAGE_NBYTES,
        };
        let refusals = Refusals::new(HashMap::new()).expect("it names none");
        let runtime = Builder::new_current_thread().enable_all().build();
        Peers {
            runtime: runtime.expect("a runtime"),
            server: Arc::new(
                Server::new(limits, HeaderMap::new(), refusals, None, Written::new(&[]))
                    .expect("a pipe"),
            ),
        }
    }
}

impl Peers {
    /// One connection, whose first byte says in what pieces the others are sent. When the peer has gone, nothing of it is left, and
    /// of each call that began the end was told, once. How many rows and messages came.
    pub fn connection(&self, data: &[u8]) -> usize {
        let Some((how, data)) = data.split_first() else {
            return 0;
        };
        self.runtime.block_on(async {
            let (near, far) = duplex(SOCKET_NBYTES);
            let places = Arc::new(Semaphore::new(1));
            let place = places.clone().try_acquire_owned().expect("it is free");
            let served = tokio::spawn(server::connection(
                self.server.clone(),
                (Box::new(far), "unix:".into()),
                place,
            ));
            let (mut read, mut write) = split(near);
            let reader = tokio::spawn(async move { copy(&mut read, &mut sink()).await });
            let mut calls = Calls::default();
            for chunk in data.chunks(1 << (how & 15)) {
                if write.write_all(chunk).await.is_err() {
                    break; // the server has ended the connection
                }
                for _ in 0..4 {
                    yield_now().await;
                }
                calls.answer(&self.server);
            }
            if how & 16 == 0 {
                let _ = write.shutdown().await;
            } else {
                reader.abort(); // gone at once, and with it what was not read
            }
            drop(write);
            let ended = timeout(END, served)
                .await
                .expect("a connection outlives its peer");
            ended.expect("a connection does not panic");
            let gone = timeout(END, async {
                while !calls.over(&self.server) {
                    sleep(Duration::from_micros(100)).await;
                }
            });
            gone.await.expect("a call outlives its connection");
            assert_eq!(
                places.available_permits(),
                1,
                "the place of a connection is not free again"
            );
            calls.came
        })
    }
}

/// The calls of one connection, as Python knows them.
#[derive(Default)]
struct Calls {
    begun: HashSet<u32>,
    ended: HashSet<u32>,
    columns: Columns,
    came: usize,
}

impl Calls {
    /// Takes what has come, and answers all of it.
    fn answer(&mut self, server: &Server) {
        let (_, noted) = server.inbox.take(&mut self.columns);
        for noted in noted {
            self.note(server, noted);
        }
        fit(&self.columns);
        self.came += self.columns.len();
        for (id, handle) in self.columns.calls.iter().zip(&self.columns.handles) {
            assert!(self.begun.contains(id), "a row of a call that never began");
            if let Some(call) = server.call(*id) {
                let since = Some(times::now());
                call.send(
                    frames::outputs(&handle.to_le_bytes(), &[0; 8], &[7; 40], &[]),
                    Answer { rows: 1, since },
                );
            }
        }
    }

    fn note(&mut self, server: &Server, noted: Noted) {
        let id = noted.call;
        match noted.what {
            Happening::Begin(_) | Happening::Step(..) => {
                assert!(self.begun.insert(id), "a call begins twice")
            }
            Happening::End => assert!(self.ended.insert(id), "a call ends twice"),
            _ => assert!(!self.ended.contains(&id), "a call goes on after its end"),
        }
        assert!(self.begun.contains(&id), "a call that never began");
        let Some(call) = server.call(id) else {
            return;
        };
        match noted.what {
            Happening::Message(message) => {
                self.came += 1;
                call.send(prefixed(&message), Answer::default());
            }
            Happening::Step(_, message) => {
                self.came += 1;
                call.send(prefixed(&message), Answer::default());
                call.finish(Status::new(0, ""));
            }
            Happening::HalfClose => call.finish(Status::new(0, "")),
            _ => {}
        }
    }

    /// Whether nothing is left of any.
    fn over(&mut self, server: &Server) -> bool {
        self.answer(server);
        server.calls.read().is_empty() && self.begun == self.ended
    }
}
