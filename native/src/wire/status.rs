//! How calls end, in gRPC's trailers.

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use http::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// What grpc-message may not have as it is.
const UNSAFE: &AsciiSet = &CONTROLS.add(b'%');

/// How a call ends: a canonical status code, words, and details (google.rpc.Status), if any.
#[derive(Clone, Debug)]
pub struct Status {
    pub code: u16,
    pub message: String,
    pub details: Vec<u8>,
}

impl Status {
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Status {
            code,
            message: message.into(),
            details: vec![],
        }
    }

    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", HeaderValue::from(self.code));
        if !self.message.is_empty() {
            let encoded = utf8_percent_encode(&self.message, UNSAFE).to_string();
            headers.insert(
                "grpc-message",
                HeaderValue::from_str(&encoded).expect("it is ASCII"),
            );
        }
        if !self.details.is_empty() {
            let encoded = STANDARD_NO_PAD.encode(&self.details);
            headers.insert(
                "grpc-status-details-bin",
                HeaderValue::from_str(&encoded).expect("it is ASCII"),
            );
        }
        headers
    }
}
