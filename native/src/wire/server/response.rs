//! Heads of responses.

use http::{HeaderMap, HeaderName, HeaderValue, Response};

use crate::wire::status::Status;

/// The response to a call that is not begun.
pub fn refused(status: &Status) -> Response<()> {
    let mut response = response(&HeaderMap::new());
    response.headers_mut().extend(status.headers());
    if status.code == 12 {
        let encodings = HeaderValue::from_static("gzip");
        response
            .headers_mut()
            .insert("grpc-accept-encoding", encodings);
    }
    response
}

/// The response to a call that begins.
pub fn response(head: &HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = head.clone();
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// Metadata as Python has it. Err: what of it makes no sense.
pub fn header_map(head: Vec<(String, String)>) -> Result<HeaderMap, http::Error> {
    let mut headers = HeaderMap::new();
    for (name, value) in head {
        headers.insert(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    Ok(headers)
}
