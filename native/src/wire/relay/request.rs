//! The request as the server behind gets it: who calls, and whence, is in headers that no client can send.

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderValue, Request, request, uri};

use crate::wire::server::Peer;
use crate::wire::status::Status;

/// What tells the server behind who calls. Headers that a client sends under these names are dropped.
const IDENTITY: &str = "engram-identity";
const PEER: &str = "engram-peer";
const TLS: &str = "engram-tls";

/// The request as the server behind gets it.
pub fn rewritten(
    mut head: request::Parts,
    identity: Option<u32>,
    peer: &Peer,
) -> Result<Request<()>, Status> {
    let path = head.uri.path_and_query().cloned();
    let path = path
        .filter(|path| path.as_str().starts_with('/'))
        .ok_or_else(|| Status::new(12, "the path names no method"))?;
    head.uri = uri_of(path).ok_or_else(|| Status::new(12, "the path names no method"))?;
    head.version = http::Version::HTTP_2;
    head.extensions = http::Extensions::new();
    let headers = &mut head.headers;
    for name in [
        "authorization",
        "host",
        "content-length",
        IDENTITY,
        PEER,
        TLS,
    ] {
        headers.remove(name);
    }
    headers.insert("te", HeaderValue::from_static("trailers"));
    if let Some(identity) = identity {
        headers.insert(IDENTITY, HeaderValue::from(identity));
    }
    if let Ok(address) = HeaderValue::from_str(&peer.address) {
        headers.insert(PEER, address);
    }
    if let Some(version) = peer.tls {
        headers.insert(TLS, HeaderValue::from_static(version));
    }
    Ok(Request::from_parts(head, ()))
}

fn uri_of(path: PathAndQuery) -> Option<Uri> {
    let mut parts = uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::from_static("localhost"));
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_says_neither_who_it_is_nor_where_the_call_goes() {
        let request = Request::post("https://elsewhere/a.B/C?d=e")
            .header("authorization", "Bearer secret")
            .header("host", "elsewhere")
            .header("engram-identity", "1")
            .header("engram-identity", "2")
            .header("engram-peer", "ipv4:6.6.6.6:6")
            .header("engram-tls", "TLSv1.3")
            .header("x", "kept")
            .body(())
            .unwrap();
        let peer = Peer {
            address: "ipv4:1.2.3.4:5".into(),
            ..Peer::default()
        };
        let relayed = rewritten(request.into_parts().0, None, &peer).unwrap();
        assert_eq!(relayed.uri(), "http://localhost/a.B/C?d=e");
        let headers = relayed.headers();
        let names: Vec<_> = headers.keys().map(|name| name.as_str()).collect();
        assert_eq!(
            (headers.len(), &headers["engram-peer"]),
            (3, &HeaderValue::from_static("ipv4:1.2.3.4:5")),
            "{names:?}"
        );
        assert!(headers.contains_key("x") && headers.contains_key("te"));
    }
}
