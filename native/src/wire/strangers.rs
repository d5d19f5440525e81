//! Requests that are no gRPC: a browser's, a probe's. They are told what this port speaks, in HTTP's own words, and cost a bounded time.

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use std::future::poll_fn;
use std::time::Duration;
use tokio::time::timeout;

const WORDS: &[u8] = b"this port speaks gRPC: POST with content-type application/grpc\n";
const BODY_NBYTES: usize = 16 << 10; // of whose body more comes is answered before its end

pub fn is_grpc<B>(request: &Request<B>) -> bool {
    let content = request.headers().get(CONTENT_TYPE);
    request.method() == Method::POST
        && content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// Answers a request when all of it has come, as HTTP wants it (a length that its head got wrong is found there), or lets it go.
pub async fn answer(body: RecvStream, mut respond: SendResponse<Bytes>, time: Duration) {
    if timeout(time, answer_whole(body, &mut respond))
        .await
        .is_err()
    {
        respond.send_reset(Reason::CANCEL);
    }
}

/// None: the peer has let go of it.
async fn answer_whole(mut body: RecvStream, respond: &mut SendResponse<Bytes>) -> Option<()> {
    let mut came = 0;
    while came < BODY_NBYTES
        && let Some(chunk) = body.data().await
    {
        came += chunk.ok()?.len();
    }
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    let plain = HeaderValue::from_static("text/plain");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    let mut stream = respond.send_response(response, false).ok()?;
    let mut words = Bytes::from_static(WORDS);
    while !words.is_empty() {
        stream.reserve_capacity(words.len());
        let window = poll_fn(|context| stream.poll_capacity(context));
        let part = words.split_to(window.await?.ok()?.min(words.len()));
        stream.send_data(part, words.is_empty()).ok()?;
    }
    Some(())
}
