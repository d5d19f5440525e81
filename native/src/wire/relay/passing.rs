//! The bytes of a call pass both ways, as fast as they are taken; and how that ends.

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};
use std::future::poll_fn;
use std::task::{Context, Poll};

use super::lengths::Lengths;
use crate::wire::server::refused;
use crate::wire::status::Status;

/// How a call ends that is not answered whole.
pub enum End {
    /// Its caller has gone.
    Gone,
    /// The server behind reset it.
    Reset(Reason),
    /// A message of it is too large.
    TooLarge(Status),
    Status(Status),
}

/// Passes the caller's bytes on as fast as they are taken. Err: why the call ends.
pub async fn send_up(
    mut body: RecvStream,
    mut upload: SendStream<Bytes>,
    mut lengths: Lengths,
) -> Result<(), End> {
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|_| End::Gone)?;
        lengths.feed(&chunk).map_err(End::TooLarge)?;
        let length = chunk.len();
        if !pass(&mut upload, chunk).await {
            return Ok(()); // the answer, which is then whole, says why no more is wanted
        }
        let _ = body.flow_control().release_capacity(length);
    }
    let _ = upload.send_data(Bytes::new(), true);
    Ok(())
}

/// Passes the answer on as fast as the caller reads. Err: why the call ends.
pub async fn send_down(
    response: ResponseFuture,
    answer: &mut Answer,
    unavailable: impl Fn() -> End,
) -> Result<(), End> {
    let broken = |error: h2::Error| match error.reason() {
        Some(reason) if error.is_reset() && error.is_remote() => End::Reset(reason),
        _ => unavailable(),
    };
    let response = tokio::select! {
        response = response => response.map_err(broken)?,
        () = answer.gone() => return Err(End::Gone),
    };
    let (head, mut body) = response.into_parts();
    let mut response = Response::from_parts(head, ());
    *response.version_mut() = http::Version::HTTP_2;
    response.extensions_mut().clear();
    let all = body.is_end_stream();
    if !answer.begin(response, all) {
        return Err(End::Gone);
    }
    if all {
        return Ok(());
    }
    loop {
        let chunk = tokio::select! {
            chunk = body.data() => chunk,
            () = answer.gone() => return Err(End::Gone),
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(broken)?;
        let length = chunk.len();
        if !answer.pass(chunk).await {
            return Err(End::Gone);
        }
        let _ = body.flow_control().release_capacity(length);
    }
    let trailers = tokio::select! {
        trailers = body.trailers() => trailers.map_err(broken)?,
        () = answer.gone() => return Err(End::Gone),
    };
    answer.end(trailers)
}

/// Sends data in the parts for which there is a window. False: the other side takes no more of it.
async fn pass(stream: &mut SendStream<Bytes>, mut data: Bytes) -> bool {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let Some(Ok(part)) = poll_fn(|context| stream.poll_capacity(context)).await else {
            return false;
        };
        let part = data.split_to(part.min(data.len()));
        if !part.is_empty() && stream.send_data(part, false).is_err() {
            return false;
        }
    }
    true
}

/// What goes back to the caller.
pub struct Answer {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>, // once the head is sent
}

impl Answer {
    pub fn new(respond: SendResponse<Bytes>) -> Self {
        Answer {
            respond,
            stream: None,
        }
    }

    fn begin(&mut self, response: Response<()>, all: bool) -> bool {
        match self.respond.send_response(response, all) {
            Ok(stream) => {
                self.stream = Some(stream);
                true
            }
            Err(_) => false,
        }
    }

    async fn pass(&mut self, data: Bytes) -> bool {
        match &mut self.stream {
            Some(stream) => pass(stream, data).await,
            None => false,
        }
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), End> {
        let stream = self.stream.as_mut().ok_or(End::Gone)?;
        match trailers {
            Some(trailers) => stream.send_trailers(trailers),
            None => stream.send_data(Bytes::new(), true),
        }
        .map_err(|_| End::Gone)
    }

    /// Returns when the caller has reset the call, or its connection is gone.
    async fn gone(&mut self) {
        poll_fn(|context| self.poll_gone(context)).await
    }

    fn poll_gone(&mut self, context: &mut Context) -> Poll<()> {
        match &mut self.stream {
            Some(stream) => stream.poll_reset(context),
            None => self.respond.poll_reset(context),
        }
        .map(drop)
    }

    pub fn finish(&mut self, status: Status) {
        match &mut self.stream {
            Some(stream) => drop(stream.send_trailers(status.headers())),
            None => drop(self.respond.send_response(refused(&status), true)),
        }
    }

    pub fn reset(&mut self, reason: Reason) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
    }
}
