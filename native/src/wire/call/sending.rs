//! The half of a call that sends: what Python answers goes as fast as its caller reads, and waits here where that is slower.

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http::{HeaderMap, Response};
use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use super::Call;
use crate::wire::status::Status;
use crate::wire::times::{self, Answer, Times};

/// What is sent of a call, and what is not yet.
pub struct Sending {
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

    /// Does this first, unless the call is over.
    pub fn unless_over(&self, work: impl FnOnce()) {
        let sending = self.sending.lock();
        if !sending.over {
            work();
        }
    }

    /// Ready when the call is over: whether all of it was sent.
    pub(super) fn poll_send(&self, context: &mut Context) -> Poll<bool> {
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
    pub fn new(respond: SendResponse<Bytes>, head: Response<()>) -> Self {
        Sending {
            respond,
            head: Some(head),
            stream: None,
            queue: VecDeque::new(),
            status: None,
            over: false,
            ended: None,
            waker: None,
        }
    }

    /// Drops what waits for its caller.
    pub fn discard(&mut self) {
        self.queue.clear();
    }

    /// The call is over. `whole`: all of it was sent.
    pub fn over(&mut self, whole: bool) {
        self.over = true;
        self.discard();
        if !whole && let Some(stream) = &mut self.stream {
            stream.send_reset(Reason::CANCEL);
        }
        // Where all of it was sent and the caller goes on, h2 tells it to stop, behind what was sent; a reset would be before it.
    }

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
