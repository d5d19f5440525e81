//! Heads of responses.

use http::{HeaderMap, HeaderValue, Response};

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
