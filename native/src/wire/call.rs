//! One call: its caller's messages go to the inbox, and what Python answers goes back as fast as its caller reads.

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::Notify;

use super::frames::{self, Steps};
use super::inbox::{Begun, Happening, Inbox};
use super::messages::{Messages, Unreadable};
use super::server::{Limits, Server};
use super::status::Status;
use super::steps::Asked;
use super::times::{self, Answer, Times};

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

/// What becomes of what a caller sends.
pub enum Reading {
    /// Frames of steps are rows, other messages are events.
    Stream,
    /// Messages are events.
    Messages,
    /// The one message is a row or an event when all is there.
    Step(Box<Begun>),
}

/// How a call went.
pub struct Served {
    pub whole: bool,          // all of it was sent; false: its caller has gone
    pub refused: Option<u16>, // the status code for messages that cannot be read
}

struct Sending {
    respond: SendResponse<Bytes>,
    head: Option<Response<()>>, // until it is sent
    stream: Option<SendStream<Bytes>>,
    queue: VecDeque<(Bytes, Answer)>, // what the caller has no window for yet
    status: Option<Status>,
    over: bool,
    ended: Option<bool>,  // by `respond`: whether all of it was sent
    waker: Option<Waker>, // of the task that sends
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
            sending: Mutex::new(Sending {
                respond,
                head: Some(head),
                stream: None,
                queue: VecDeque::new(),
                status: None,
                over: false,
                ended: None,
                waker: None,
            }),
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

    /// Sends a message that answers something: at once where its caller has a window for it. From any thread.
    pub fn send(&self, message: Bytes, answer: Answer) {
        let mut sending = self.sending.lock();
        if sending.over || sending.status.is_some() {
            drop(sending);
            self.gone(answer.rows);
        } else if sending.queue.is_empty() && sending.fits(message.len()) {
            sending.write(message, answer, &self.times);
            drop(sending);
            self.gone(answer.rows);
        } else {
            sending.queue.push_back((message, answer));
            sending.wake();
        }
    }

    /// Sends the head of the response now, before there is a message.
    pub fn begin(&self) {
        self.sending.lock().begin();
    }

    /// Ends the call when all that was sent before is on its way.
    pub fn finish(&self, status: Status) {
        let mut sending = self.sending.lock();
        if sending.status.is_none() {
            sending.status = Some(status);
            sending.wake();
        }
    }

    /// The one message of a call, and its end. False: the call is over or ends otherwise.
    pub fn respond(&self, message: Bytes) -> bool {
        let mut sending = self.sending.lock();
        if sending.over || sending.status.is_some() {
            return false;
        }
        sending.status = Some(Status::new(0, ""));
        let (rows, since) = (0, Some(times::now())); // a unary call has no rows under way
        let answer = Answer { rows, since };
        if sending.queue.is_empty() && sending.fits(message.len()) {
            sending.write(message, answer, &self.times);
            sending.ended = Some(sending.end());
        } else {
            sending.queue.push_back((message, answer));
        }
        sending.wake();
        true
    }

    /// Tells Python what happens to the call.
    pub fn tell(&self, inbox: &Inbox, what: Happening) {
        self.told.store(true, Ordering::Relaxed);
        inbox.push(self.id, what);
    }

    /// Does this first, unless the call is over.
    pub fn unless_over(&self, work: impl FnOnce()) {
        let sending = self.sending.lock();
        if !sending.over {
            work();
        }
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
                    self.sending.lock().queue.clear();
                    self.finish(Status::new(4, "the time of the call is up"));
                }
            }
        };
        let mut sending = self.sending.lock();
        sending.over = true;
        sending.queue.clear();
        if !whole && let Some(stream) = &mut sending.stream {
            stream.send_reset(Reason::CANCEL);
        }
        // Where all of it was sent and the caller goes on, h2 tells it to stop, behind what was sent; a reset would be before it.
        Served { whole, refused }
    }

    /// Returns at the end of what the caller sends. Err: why it makes no sense; None: the caller has gone.
    async fn read(
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

    /// Ready when the call is over: whether all of it was sent.
    fn poll_send(&self, context: &mut Context) -> Poll<bool> {
        let mut sending = self.sending.lock();
        let mut gone = 0;
        let ready = sending.poll(context, &mut gone, &self.times);
        if ready.is_pending()
            && !sending
                .waker
                .as_ref()
                .is_some_and(|waker| waker.will_wake(context.waker()))
        {
            sending.waker = Some(context.waker().clone());
        }
        drop(sending);
        self.gone(gone);
        ready
    }
}

impl Sending {
    fn begin(&mut self) {
        if let Some(head) = self.head.take() {
            self.stream = self.respond.send_response(head, false).ok();
        }
    }

    /// Whether a message may be written now.
    fn fits(&mut self, length: usize) -> bool {
        self.begin();
        let Some(stream) = &mut self.stream else {
            return true;
        }; // nobody will read it
        stream.reserve_capacity(length);
        stream.capacity() >= length
    }

    fn write(&mut self, message: Bytes, answer: Answer, times: &Times) {
        if let Some(stream) = &mut self.stream {
            answer.begins(times);
            let _ = stream.send_data(message, false);
        }
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Sends the status, behind all else. False: the caller has gone.
    fn end(&mut self) -> bool {
        let headers = self
            .status
            .as_ref()
            .map_or_else(HeaderMap::new, Status::headers);
        match (&mut self.stream, self.head.take()) {
            (Some(stream), _) => stream.send_trailers(headers).is_ok(),
            (None, Some(mut head)) => {
                head.headers_mut().extend(headers);
                self.respond.send_response(head, true).is_ok()
            }
            (None, None) => false,
        }
    }

    fn poll(&mut self, context: &mut Context, gone: &mut usize, times: &Times) -> Poll<bool> {
        if let Some(whole) = self.ended {
            return Poll::Ready(whole);
        }
        while let Some((message, _)) = self.queue.front_mut() {
            let left = message.len();
            self.begin();
            let Some(stream) = &mut self.stream else {
                return Poll::Ready(false);
            };
            stream.reserve_capacity(left);
            let part = match stream.poll_capacity(context) {
                Poll::Ready(Some(Ok(part))) => part.min(left),
                Poll::Ready(_) => return Poll::Ready(false),
                Poll::Pending => break,
            };
            let (message, answer) = self.queue.front_mut().expect("it was there");
            let piece = message.split_to(part);
            if message.is_empty() {
                answer.begins(times);
            }
            let _ = stream.send_data(piece, false);
            if message.is_empty() {
                *gone += answer.rows;
                self.queue.pop_front();
            }
        }
        if self.queue.is_empty() && self.status.is_some() {
            return Poll::Ready(self.end());
        }
        let reset = match &mut self.stream {
            Some(stream) => stream.poll_reset(context),
            None => self.respond.poll_reset(context),
        };
        if reset.is_ready() {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    }
}
