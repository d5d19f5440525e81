//! Who is at the other end of a connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::wire::times::Times;

/// The other end of a connection.
#[derive(Default)]
pub struct Peer {
    pub address: String,           // as gRPC spells it
    pub tls: Option<&'static str>, // its version
    pub times: Arc<Times>,
}

/// An address as gRPC has it.
pub fn spelled(address: SocketAddr) -> String {
    let port = address.port();
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => format!("ipv4:{ip}:{port}"),
        IpAddr::V6(ip) => format!("ipv6:%5B{ip}%5D:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_spelled_as_grpc_does() {
        for (address, wanted) in [
            ("1.2.3.4:567", "ipv4:1.2.3.4:567"),
            ("[::1]:567", "ipv6:%5B::1%5D:567"),
            ("[::ffff:1.2.3.4]:567", "ipv4:1.2.3.4:567"),
        ] {
            assert_eq!(spelled(address.parse().unwrap()), wanted);
        }
    }
}
