//! One connection with its sessions: a stream, unary calls one after the other, or posts.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::frames::{self, Said, Steps};
use crate::link::Link;
use crate::options::{Options, Protocol};
use crate::{Failure, Figures, http1, http2};

/// From when to when steps count.
pub type Window = Option<(Instant, Instant)>;

pub struct Connection {
    pub link: Link,
    reader: http2::Reader,
    heads: http2::Heads,
    bytes: Vec<u8>, // of HTTP/1.1
    out: Vec<u8>,
    call: u32,                  // the number of the HTTP/2 stream
    first: usize,               // number of its first session
    names: Vec<String>,         // of its sessions
    unique: u64,                // of this run
    handles: Vec<u32>,          // by place, of those that are open
    place: HashMap<u32, usize>, // handle -> place among its sessions
    sent: Vec<Instant>,         // by place: when its step was sent, or was to be sent
    busy: Vec<bool>,
    late: Vec<VecDeque<Instant>>, // steps whose time came before the last one's answer
    next: Vec<u64>,
    pub over: bool,
}

impl Connection {
    pub fn new(options: &Options, number: usize) -> Result<Self, Failure> {
        let first = number * options.sessions / options.connections;
        let sessions = (number + 1) * options.sessions / options.connections - first;
        let begun = std::time::UNIX_EPOCH.elapsed()?.as_micros() as u64;
        let unique = begun * 1_000_003 + u64::from(std::process::id()) * 65_537 + number as u64 + 1;
        let mut new = Connection {
            link: Link::connect(options.address, options.tls.as_ref())?,
            reader: http2::Reader::new(),
            heads: http2::Heads::new(
                &options.path,
                options.token.as_deref(),
                options.tls.is_some(),
            ),
            bytes: vec![],
            out: vec![],
            call: 1,
            first,
            names: (0..sessions)
                .map(|place| format!("load-{unique}-{place}"))
                .collect(),
            unique,
            handles: vec![],
            place: HashMap::new(),
            sent: vec![Instant::now(); sessions],
            busy: vec![false; sessions],
            late: vec![VecDeque::new(); sessions],
            next: vec![1; sessions],
            over: false,
        };
        if options.protocol != Protocol::Http {
            http2::put_preface(&mut new.out);
        }
        if options.protocol == Protocol::Stream {
            new.heads.put(&mut new.out, new.call);
            let open = frames::open(&options.model, &new.names, unique, options.interval);
            http2::put_message(&mut new.out, new.call, &open, false);
        } else {
            new.opened(vec![0]); // by its first step
        }
        new.write()?;
        Ok(new)
    }

    pub fn open(&self) -> usize {
        self.handles.len()
    }

    fn opened(&mut self, handles: Vec<u32>) {
        let start = self.handles.len();
        self.place.extend(handles.iter().copied().zip(start..));
        self.handles.extend(handles);
    }

    /// How long the oldest step waits that has no answer.
    pub fn oldest(&self, now: Instant) -> Duration {
        let waits = self.busy.iter().zip(&self.sent).filter(|(busy, _)| **busy);
        waits.map(|(_, sent)| now - *sent).max().unwrap_or_default()
    }

    /// Reads what is there, and sends the next steps of the sessions that have their outputs.
    pub fn turn(
        &mut self,
        options: &Options,
        buffer: &mut [u8],
        window: Window,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        let http = options.protocol == Protocol::Http;
        let (reader, bytes) = (&mut self.reader, &mut self.bytes);
        let there = self.link.read(buffer, |read| {
            if http {
                bytes.extend_from_slice(read);
            } else {
                reader.feed(read);
            }
        })?;
        let now = Instant::now();
        match options.protocol {
            Protocol::Stream => self.hear_stream(options, now, window, figures)?,
            Protocol::Unary => self.hear_unary(options, now, window, figures)?,
            Protocol::Http => {
                while let Some(body) = http1::answer(&mut self.bytes)? {
                    self.answered(options, &[0], &body, now, window, figures)?;
                }
            }
        }
        if !there {
            return Err("the server closed the connection".into());
        }
        self.write()
    }

    fn hear_stream(
        &mut self,
        options: &Options,
        now: Instant,
        window: Window,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        let (messages, ended) = self.reader.messages(self.call, &mut self.out)?;
        for message in messages {
            match frames::said(&message) {
                Said::Opened(handles) => self.opened(handles),
                Said::Outputs {
                    handles,
                    seqs,
                    outputs,
                } => {
                    let mut places = Vec::with_capacity(handles.len());
                    for (handle, seq) in handles.iter().zip(seqs) {
                        let place = self.place.get(handle);
                        let place =
                            *place.ok_or("an output of a session that was not asked for")?;
                        if seq != self.next[place] {
                            let due = self.next[place];
                            let why =
                                format!("the output of step {seq} came for that of step {due}");
                            return Err(why.into());
                        }
                        places.push(place);
                    }
                    self.answered(options, &places, &outputs, now, window, figures)?;
                }
                Said::Refused(why) => return Err(why.into()),
                Said::Else => {}
            }
        }
        ended.map_or(Ok(()), |end| Err(end.why.into()))
    }

    fn hear_unary(
        &mut self,
        options: &Options,
        now: Instant,
        window: Window,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        let (mut messages, ended) = self.reader.messages(self.call, &mut self.out)?;
        // Message and end may come apart; the step is done with its end.
        if let Some(message) = messages.pop() {
            self.bytes = frames::step_output(&message);
        }
        match ended {
            None => Ok(()),
            Some(end) if end.status == "0" => {
                let output = std::mem::take(&mut self.bytes);
                self.answered(options, &[0], &output, now, window, figures)
            }
            Some(end) => Err(end.why.into()),
        }
    }

    /// Outputs have come of the sessions in these places.
    fn answered(
        &mut self,
        options: &Options,
        places: &[usize],
        outputs: &[u8],
        now: Instant,
        window: Window,
        figures: &mut Figures,
    ) -> Result<(), Failure> {
        let width = options.reference.output_nbytes();
        if outputs.len() != width * places.len() {
            return Err("an output has not the reference's width".into());
        }
        for (&place, output) in places.iter().zip(outputs.chunks(width)) {
            let seq = self.next[place];
            (self.next[place], self.busy[place]) = (seq + 1, false);
            figures.compare(options.reference.error(self.first + place, seq, output));
            if window.is_some_and(|(start, end)| now >= start && now < end) {
                let took = now - self.sent[place];
                figures.latencies_us.push(took.as_micros() as u32);
            }
        }
        if options.period.is_none() {
            if window.is_some_and(|(_, end)| now < end) {
                self.step(options, places, now);
            }
            return Ok(());
        }
        for &place in places {
            if let Some(due) = self.late[place].pop_front() {
                self.step(options, &[place], due);
            }
        }
        Ok(())
    }

    /// The time has come for a step of the session in this place, which waits for the last one's answer if it must.
    pub fn due(&mut self, options: &Options, place: usize, due: Instant) -> Result<(), Failure> {
        if self.busy[place] {
            self.late[place].push_back(due);
            return Ok(());
        }
        self.step(options, &[place], due);
        self.write()
    }

    pub fn step_all(&mut self, options: &Options) -> Result<(), Failure> {
        let all: Vec<usize> = (0..self.handles.len()).collect();
        self.step(options, &all, Instant::now());
        self.write()
    }

    fn step(&mut self, options: &Options, places: &[usize], sent: Instant) {
        let mut steps = Steps::default();
        for &place in places {
            (self.sent[place], self.busy[place]) = (sent, true);
            let seq = self.next[place];
            let input = options.reference.input(self.first + place, seq);
            match options.protocol {
                Protocol::Stream => steps.push(self.handles[place], seq, input),
                Protocol::Unary => {
                    self.call = 2 * seq as u32 - 1;
                    self.heads.put(&mut self.out, self.call);
                    let name = &self.names[place];
                    let message = frames::step_request(name, &options.model, seq, input);
                    http2::put_message(&mut self.out, self.call, &message, true);
                }
                Protocol::Http => {
                    http1::put_request(&mut self.out, &options.path, self.unique, input)
                }
            }
        }
        if options.protocol == Protocol::Stream {
            http2::put_message(&mut self.out, self.call, &steps.message(), false);
        }
    }

    fn write(&mut self) -> Result<(), Failure> {
        self.link.write(&self.out)?;
        self.out.clear();
        Ok(())
    }
}
