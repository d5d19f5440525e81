//! What is to be done, from the command line.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

use crate::reference::Reference;
use crate::{Failure, link};

pub const HELP: &str = "engram-load ADDRESS --model NAME --reference FILE [--protocol stream|unary|http] [--sessions N] [--connections N]
            [--interval] [--rate HZ] [--idle] [--token TOKEN] [--tls-ca FILE] [--path PATH] [--seconds S] [--warm-up S]";

#[derive(Clone, Copy, PartialEq)]
pub enum Protocol {
    Stream,
    Unary,
    Http,
}

pub struct Options {
    pub address: SocketAddr,
    pub protocol: Protocol,
    pub path: String,
    pub model: String,
    pub reference: Reference,
    pub sessions: usize,
    pub connections: usize,
    pub interval: bool,
    pub period: Option<Duration>, // of a session that steps at a rate; None: in a closed loop
    pub idle: bool,
    pub token: Option<String>,
    pub tls: Option<Arc<ClientConfig>>,
    pub warm_up: Duration,
    pub time: Duration,
}

pub fn options() -> Result<Options, Failure> {
    use lexopt::prelude::*;
    let (mut address, mut model, mut reference, mut path) = (None, None, None, None);
    let (mut sessions, mut connections, mut interval, mut token) = (1, None, false, None);
    let (mut warm_up, mut seconds, mut rate, mut idle) = (2.0, 8.0, 0.0, false);
    let (mut tls, mut protocol) = (None, Protocol::Stream);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(value) if address.is_none() => {
                address = value.string()?.to_socket_addrs()?.next()
            }
            Long("protocol") => protocol = named(&parser.value()?.string()?)?,
            Long("path") => path = Some(parser.value()?.string()?),
            Long("model") => model = Some(parser.value()?.string()?),
            Long("reference") => reference = Some(Reference::read(&parser.value()?.string()?)?),
            Long("sessions") => sessions = parser.value()?.parse()?,
            Long("connections") => connections = Some(parser.value()?.parse()?),
            Long("interval") => interval = true,
            Long("rate") => rate = parser.value()?.parse()?,
            Long("idle") => idle = true,
            Long("token") => token = Some(parser.value()?.string()?),
            Long("tls-ca") => tls = Some(link::trust(&parser.value()?.string()?)?),
            Long("warm-up") => warm_up = parser.value()?.parse()?,
            Long("seconds") => seconds = parser.value()?.parse()?,
            _ => return Err(argument.unexpected().into()),
        }
    }
    let connections = connections.unwrap_or(sessions).clamp(1, sessions);
    if protocol != Protocol::Stream && (connections != sessions || idle) {
        return Err("a connection that is no stream has one session, which steps".into());
    }
    let usual = match protocol {
        Protocol::Stream => "/engram.v1.EngramService/Stream",
        Protocol::Unary => "/engram.v1.EngramService/Step",
        Protocol::Http => "/inference",
    };
    Ok(Options {
        address: address.ok_or("which server? HOST:PORT")?,
        protocol,
        path: path.unwrap_or(usual.into()),
        model: model.ok_or("--model is missing")?,
        reference: reference.ok_or("--reference is missing")?,
        sessions,
        connections,
        interval,
        period: (rate > 0.0).then(|| Duration::from_secs_f64(1.0 / rate)),
        idle,
        token,
        tls,
        warm_up: Duration::from_secs_f64(warm_up),
        time: Duration::from_secs_f64(seconds),
    })
}

fn named(name: &str) -> Result<Protocol, Failure> {
    match name {
        "stream" => Ok(Protocol::Stream),
        "unary" => Ok(Protocol::Unary),
        "http" => Ok(Protocol::Http),
        _ => Err(format!("no protocol {name}: stream, unary or http").into()),
    }
}
