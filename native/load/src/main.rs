//! engram-load: sessions that step in a closed loop, over as many connections as one likes, in one thread that costs little.
//!
//! Each session sends its next input when it has the output of the last one. Outputs are compared with those of a reference file:
//! four 32-bit numbers (variants, steps, inputs, outputs of a row), then the inputs and the outputs as float32. Prints one line of
//! JSON.

mod frames;
mod http2;

use polling::{Event, Events, Poller};
use std::collections::HashMap;
use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use frames::{Said, Steps};

type Failure = Box<dyn Error>;

const HELP: &str = "engram-load ADDRESS --model NAME --reference FILE [--sessions N] [--connections N] [--interval] [--token TOKEN]
            [--seconds S] [--warm-up S]";
const PATH: &str = "/engram.v1.EngramService/Stream";
const OPEN_S: u64 = 120;
const TOLERANCE: f32 = 1e-4;

struct Options {
    address: SocketAddr,
    model: String,
    reference: Reference,
    sessions: usize,
    connections: usize,
    interval: bool,
    token: Option<String>,
    warm_up: Duration,
    time: Duration,
}

fn options() -> Result<Options, Failure> {
    use lexopt::prelude::*;
    let (mut address, mut model, mut reference) = (None, None, None);
    let (mut sessions, mut connections, mut interval, mut token) = (1, None, false, None);
    let (mut warm_up, mut seconds) = (2.0, 8.0);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(value) if address.is_none() => {
                address = value.string()?.to_socket_addrs()?.next()
            }
            Long("model") => model = Some(parser.value()?.string()?),
            Long("reference") => reference = Some(Reference::read(&parser.value()?.string()?)?),
            Long("sessions") => sessions = parser.value()?.parse()?,
            Long("connections") => connections = Some(parser.value()?.parse()?),
            Long("interval") => interval = true,
            Long("token") => token = Some(parser.value()?.string()?),
            Long("warm-up") => warm_up = parser.value()?.parse()?,
            Long("seconds") => seconds = parser.value()?.parse()?,
            _ => return Err(argument.unexpected().into()),
        }
    }
    Ok(Options {
        address: address.ok_or("which server? HOST:PORT")?,
        model: model.ok_or("--model is missing")?,
        reference: reference.ok_or("--reference is missing")?,
        sessions,
        connections: connections.unwrap_or(sessions).clamp(1, sessions),
        interval,
        token,
        warm_up: Duration::from_secs_f64(warm_up),
        time: Duration::from_secs_f64(seconds),
    })
}

/// Inputs, and the outputs that they must have.
struct Reference {
    variants: usize,
    steps: usize,
    inputs: usize, // numbers of a row
    outputs: usize,
    x: Vec<u8>,
    y: Vec<u8>,
}

impl Reference {
    fn read(path: &str) -> Result<Self, Failure> {
        let bytes = std::fs::read(path)?;
        let head: Vec<usize> = bytes
            .as_chunks()
            .0
            .iter()
            .take(4)
            .map(|four| u32::from_le_bytes(*four) as usize)
            .collect();
        let [variants, steps, inputs, outputs] = head[..] else {
            return Err(format!("{path} is too short").into());
        };
        let middle = 16 + 4 * variants * steps * inputs;
        if bytes.len() != middle + 4 * variants * steps * outputs {
            return Err(format!("{path} has not the length that its head says").into());
        }
        Ok(Reference {
            variants,
            steps,
            inputs,
            outputs,
            x: bytes[16..middle].to_vec(),
            y: bytes[middle..].to_vec(),
        })
    }

    fn input(&self, session: usize, seq: u64) -> &[u8] {
        let row = session % self.variants * self.steps + (seq as usize - 1) % self.steps;
        &self.x[4 * row * self.inputs..][..4 * self.inputs]
    }

    /// How far an output is from what it must be; None beyond the steps that are known.
    fn error(&self, session: usize, seq: u64, output: &[u8]) -> Option<f32> {
        if seq as usize > self.steps {
            return None;
        }
        let row = session % self.variants * self.steps + seq as usize - 1;
        let wanted = &self.y[4 * row * self.outputs..][..4 * self.outputs];
        let number = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        let pairs = wanted.as_chunks().0.iter().zip(output.as_chunks().0);
        Some(
            pairs
                .map(|(one, other)| (number(one) - number(other)).abs())
                .fold(0.0, f32::max),
        )
    }
}

/// One connection with one stream, and its sessions.
struct Connection {
    socket: TcpStream,
    reader: http2::Reader,
    out: Vec<u8>,
    first: usize,               // number of its first session
    place: HashMap<u32, usize>, // handle -> place among its sessions
    sent: Vec<Instant>,         // by place
    next: Vec<u64>,
    over: bool,
}

#[derive(Default)]
struct Figures {
    latencies_us: Vec<u32>,
    checked: u64,
    error: f32,
    failures: u64,
    why: String,
}

fn main() -> Result<(), Failure> {
    let options = options().map_err(|error| format!("{error}\n{HELP}"))?;
    let poller = Poller::new()?;
    let mut connections = vec![];
    for number in 0..options.connections {
        let first = number * options.sessions / options.connections;
        let sessions = (number + 1) * options.sessions / options.connections - first;
        let connection = connect(&options, first, sessions, number)?;
        unsafe {
            poller.add_with_mode(
                &connection.socket,
                Event::readable(number),
                polling::PollMode::Level,
            )?
        };
        connections.push(connection);
    }
    let mut figures = Figures::default();
    let (mut events, mut buffer) = (Events::new(), vec![0; 1 << 16]);
    let (mut opened, mut lost) = (0, 0);
    let begun = Instant::now();
    let mut window = None; // in which steps count
    let mut used = 0.0;
    let usage = loop {
        events.clear();
        poller.wait(&mut events, Some(Duration::from_millis(50)))?;
        for event in events.iter() {
            let connection = &mut connections[event.key];
            let before = connection.place.len();
            if let Err(why) = connection.turn(&options, &mut buffer, window, &mut figures) {
                poller.delete(&connection.socket)?;
                (connection.over, lost) = (true, lost + 1);
                figures.failures += 1;
                figures.why = why.to_string();
            }
            opened += connection.place.len() - before;
        }
        let now = Instant::now();
        match window {
            None if opened + lost >= options.sessions || lost == options.connections => {
                let start = now + options.warm_up;
                window = Some((start, start + options.time));
                for connection in connections.iter_mut().filter(|connection| !connection.over) {
                    let all: Vec<u32> = connection.place.keys().copied().collect();
                    connection.step(&options, &all);
                    let _ = connection.write();
                }
            }
            None if begun.elapsed() > Duration::from_secs(OPEN_S) => {
                return Err("the sessions were not opened in time".into());
            }
            Some((start, _)) if used == 0.0 && now >= start => used = cpu_s(),
            Some((_, end)) if now >= end => {
                break (cpu_s() - used) / options.time.as_secs_f64();
            }
            _ => {}
        }
    };
    report(&options, figures, usage);
    Ok(())
}

fn connect(
    options: &Options,
    first: usize,
    sessions: usize,
    number: usize,
) -> Result<Connection, Failure> {
    let socket = TcpStream::connect(options.address)?;
    socket.set_nodelay(true)?;
    let mut connection = Connection {
        socket,
        reader: http2::Reader::default(),
        out: vec![],
        first,
        place: HashMap::new(),
        sent: vec![Instant::now(); sessions],
        next: vec![1; sessions],
        over: false,
    };
    let unique = std::process::id() as u64 * 1_000_003 + number as u64;
    let names: Vec<String> = (0..sessions)
        .map(|place| format!("load-{unique}-{place}"))
        .collect();
    http2::hello(&mut connection.out, PATH, options.token.as_deref());
    http2::put_message(
        &mut connection.out,
        &frames::open(&options.model, &names, unique + 2, options.interval),
    );
    connection.write()?;
    connection.socket.set_nonblocking(true)?;
    Ok(connection)
}

impl Connection {
    /// Reads what is there, and sends the next steps of the sessions that have their outputs.
    fn turn(
        &mut self,
        options: &Options,
        buffer: &mut [u8],
        window: Option<(Instant, Instant)>,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        match self.socket.read(buffer) {
            Ok(0) => return Err("the server closed the connection".into()),
            Ok(length) => self.reader.feed(&buffer[..length]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        let now = Instant::now();
        for message in self.reader.messages(&mut self.out)? {
            match frames::said(&message) {
                Said::Opened { refused: true, .. } => {
                    return Err("the server refused to open a session".into());
                }
                Said::Opened { handles, .. } => {
                    let start = self.place.len();
                    self.place.extend(handles.into_iter().zip(start..));
                }
                Said::Outputs {
                    handles,
                    seqs,
                    outputs,
                } => {
                    self.take(options, &handles, &seqs, &outputs, now, window, figures)?;
                    if window.is_some_and(|(_, end)| now < end) {
                        self.step(options, &handles);
                    }
                }
                Said::Refused => return Err("the server refused a step".into()),
                Said::Else => {}
            }
        }
        self.write()
    }

    #[allow(clippy::too_many_arguments)]
    fn take(
        &mut self,
        options: &Options,
        handles: &[u32],
        seqs: &[u64],
        outputs: &[u8],
        now: Instant,
        window: Option<(Instant, Instant)>,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        let width = 4 * options.reference.outputs;
        if outputs.len() != width * handles.len() {
            return Err("an output has not the reference's width".into());
        }
        for ((handle, seq), output) in handles.iter().zip(seqs).zip(outputs.chunks(width)) {
            let place = *self
                .place
                .get(handle)
                .ok_or("an output of a session that was not asked for")?;
            if *seq != self.next[place] {
                return Err(format!(
                    "the output of step {seq} came for that of step {}",
                    self.next[place]
                )
                .into());
            }
            self.next[place] += 1;
            if let Some(error) = options.reference.error(self.first + place, *seq, output) {
                figures.checked += 1;
                figures.error = figures.error.max(error);
            }
            if window.is_some_and(|(start, end)| now >= start && now < end) {
                figures
                    .latencies_us
                    .push((now - self.sent[place]).as_micros() as u32);
            }
        }
        Ok(())
    }

    fn step(&mut self, options: &Options, handles: &[u32]) {
        let (mut steps, now) = (Steps::default(), Instant::now());
        for handle in handles {
            let place = self.place[handle];
            self.sent[place] = now;
            steps.push(
                *handle,
                self.next[place],
                options
                    .reference
                    .input(self.first + place, self.next[place]),
            );
        }
        http2::put_message(&mut self.out, &steps.message());
    }

    fn write(&mut self) -> Result<(), Failure> {
        let mut sent = 0;
        while sent < self.out.len() {
            match self.socket.write(&self.out[sent..]) {
                Ok(length) => sent += length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => {
                    std::thread::yield_now()
                }
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        Ok(())
    }
}

fn report(options: &Options, mut figures: Figures, usage: f64) {
    let latencies = &mut figures.latencies_us;
    latencies.sort_unstable();
    let at = |share: f64| {
        latencies
            .get((share * latencies.len() as f64) as usize)
            .copied()
            .unwrap_or(0) as f64
            / 1000.0
    };
    let equal = figures.checked > 0 && figures.error <= TOLERANCE;
    println!(
        "{{\"sessions\": {}, \"connections\": {}, \"steps_per_s\": {:.0}, \"p50_ms\": {:.3}, \"p99_ms\": {:.3}, \"checked\": {}, \
         \"greatest_error\": {:e}, \"outputs_equal\": {equal}, \"failures\": {}, \"why\": {:?}, \"client_cores\": {usage:.2}}}",
        options.sessions,
        options.connections,
        latencies.len() as f64 / options.time.as_secs_f64(),
        at(0.5),
        at(0.99),
        figures.checked,
        figures.error,
        figures.failures,
        figures.why,
    );
}

/// Seconds of processor that this process has used.
fn cpu_s() -> f64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
