//! One call: its caller's messages go to the inbox, and what Python answers goes back as fast as its caller reads.

mod reading;
mod sending;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Response;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

pub use reading::Reading;

use super::inbox::{Happening, Inbox};
use super::messages::{Messages, Unreadable};
use super::server::{Limits, Server};
use super::status::Status;
use super::steps::Asked;
use super::times::Times;
use sending::Sending;

/// A call, as who answers it knows it.
pub struct Call {
    pub id: u32,
    pub identity: Option<u32>,
    sending: Mutex<Sending>,
    rows: AtomicI64, // that came and whose answer has not gone
    rows_max: i64,
    frame_rows: usize,
    frame_nbytes: usize,
    answered: Notify,
    told: AtomicBool, // Python knows of it, and is told when it is over
    times: Arc<Times>,
    pub asked: Mutex<Option<Asked>>, // of a unary step that is a row
}

/// How a call went.
pub struct Served {
    pub whole: bool,          // all of it was sent; false: its caller has gone
    pub refused: Option<u16>, // the status code for messages that cannot be read
}

impl Call {
    pub fn new(
        id: u32,
        identity: Option<u32>,
        respond: SendResponse<Bytes>,
        head: Response<()>,
        limits: &Limits,
        times: Arc<Times>,
    ) -> Arc<Self> {
        Arc::new(Call {
            id,
            identity,
            sending: Mutex::new(Sending::new(respond, head)),
            rows: AtomicI64::new(0),
            rows_max: limits.rows as i64,
            frame_rows: limits.frame_rows,
            frame_nbytes: limits.frame_nbytes,
            answered: Notify::new(),
            told: AtomicBool::new(false),
            times,
            asked: Mutex::new(None),
        })
    }

    /// Tells Python what happens to the call.
    pub fn tell(&self, inbox: &Inbox, what: Happening) {
        self.told.store(true, Ordering::Relaxed);
        inbox.push(self.id, what);
    }

    /// Tells Python that the call is over, if it knows of it.
    pub fn tell_end(&self, inbox: &Inbox) {
        if self.told.load(Ordering::Relaxed) {
            inbox.push(self.id, Happening::End);
        }
    }

    fn gone(&self, rows: usize) {
        if rows > 0 {
            self.expect(-(rows as i64));
        }
    }

    /// So many more rows are under way than were read; a negative number: so many less.
    pub fn expect(&self, rows: i64) {
        if self.rows.fetch_add(rows, Ordering::Relaxed) >= self.rows_max && rows < 0 {
            self.answered.notify_waiters();
        }
    }

    /// Reads the call and sends what is given to it, until it is over.
    pub async fn serve(
        &self,
        server: &Server,
        body: RecvStream,
        messages: Messages,
        reading: Reading,
        time: Option<Duration>,
    ) -> Served {
        let mut refused = None;
        let reading = self.read(server, body, messages, reading);
        let late = async {
            match time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        let (mut reading, mut late) = (std::pin::pin!(reading), std::pin::pin!(late));
        let (mut read, mut in_time) = (false, true);
        let whole = loop {
            tokio::select! {
                unreadable = &mut reading, if !read => match unreadable {
                    Ok(()) => read = true,
                    Err(Some(Unreadable(code, why))) => { self.finish(Status::new(code, why)); (read, refused) = (true, Some(code)) }
                    Err(None) => break false,
                },
                whole = std::future::poll_fn(|context| self.poll_send(context)) => break whole,
                () = &mut late, if in_time => {
                    in_time = false;
                    self.sending.lock().discard();
                    self.finish(Status::new(4, "the time of the call is up"));
                }
            }
        };
        self.sending.lock().over(whole);
        Served { whole, refused }
    }
}
