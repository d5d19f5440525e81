//! engram-load: sessions that step, over as many connections as one likes, in one thread that costs little.
//!
//! In a closed loop a session sends its next input when it has the output of the last one. At a rate (`--rate`) it sends one when
//! its time has come, and a step's time counts from then, whatever kept it. Idle ones (`--idle`) are opened and held. Outputs are
//! compared with those of a reference file. Prints "window" when steps begin to count, and at the end one line of JSON; on stderr
//! why a connection ended before its time.

mod connection;
mod frames;
mod http1;
mod http2;
mod link;
mod options;
mod reference;

use polling::{Event, Events, PollMode, Poller};
use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use connection::Connection;
use options::Options;

type Failure = Box<dyn Error>;

const OPEN_S: u64 = 120;
const TOLERANCE: f32 = 1e-4;
const WAIT: Duration = Duration::from_millis(50);
const REASONS: usize = 4; // that the result names
const TOLD: u64 = 5; // ends that are told on stderr

#[derive(Default)]
struct Figures {
    latencies_us: Vec<u32>,
    checked: u64,
    error: f32,
    failures: u64,
    reasons: BTreeMap<String, u64>, // why, and how often
}

impl Figures {
    fn compare(&mut self, error: Option<f32>) {
        if let Some(error) = error {
            self.checked += 1;
            self.error = if error > self.error || error.is_nan() {
                error
            } else {
                self.error
            };
        }
    }

    fn failed(&mut self, why: String) {
        if self.failures < TOLD {
            eprintln!("engram-load: a connection ended: {why}");
        }
        self.failures += 1;
        *self.reasons.entry(why).or_default() += 1;
    }
}

/// Whose step is due next, and when: sessions take turns, evenly over a period.
struct Pace {
    begun: Instant,
    step: u64,
}

fn main() -> Result<(), Failure> {
    let options = options::options().map_err(|error| format!("{error}\n{}", options::HELP))?;
    let poller = Poller::new()?;
    let (mut connections, mut homes) = (vec![], vec![]);
    for number in 0..options.connections {
        let connection = Connection::new(&options, number)?;
        unsafe {
            poller.add_with_mode(
                connection.link.socket(),
                Event::readable(number),
                PollMode::Level,
            )?
        };
        let sessions = (number + 1) * options.sessions / options.connections
            - number * options.sessions / options.connections;
        homes.extend((0..sessions).map(|place| (number, place)));
        connections.push(connection);
    }
    let mut figures = Figures::default();
    let (mut events, mut buffer) = (Events::new(), vec![0; 1 << 16]);
    let mut opened: usize = connections.iter().map(Connection::open).sum();
    let (begun, mut window, mut used) = (Instant::now(), None::<(Instant, Instant)>, None);
    let mut pace = None;
    loop {
        events.clear();
        let wait = pace.as_ref().map_or(WAIT, |pace| until_due(&options, pace));
        poller.wait(&mut events, Some(wait))?;
        for event in events.iter() {
            let connection = &mut connections[event.key];
            let before = connection.open();
            let turned = connection.turn(&options, &mut buffer, window, &mut figures);
            opened += connection.open() - before;
            lose_if(turned, connection, &poller, &mut figures)?;
        }
        let now = Instant::now();
        match window {
            None if opened + figures.failures as usize >= options.sessions
                || figures.failures as usize == options.connections =>
            {
                let start = now + options.warm_up;
                window = Some((start, start + options.time));
                if options.period.is_some() {
                    pace = Some(Pace {
                        begun: now,
                        step: 0,
                    });
                } else if !options.idle {
                    for connection in connections.iter_mut().filter(|one| !one.over) {
                        let stepped = connection.step_all(&options);
                        lose_if(stepped, connection, &poller, &mut figures)?;
                    }
                }
            }
            None if begun.elapsed() > Duration::from_secs(OPEN_S) => {
                return Err("the sessions were not opened in time".into());
            }
            Some((start, _)) if used.is_none() && now >= start => {
                println!("window");
                used = Some(cpu_s());
            }
            Some((_, end)) if now >= end => break,
            _ => {}
        }
        if let Some(pace) = pace.as_mut() {
            while let Some(due) = next_due(&options, pace, now) {
                let (number, place) = homes[(pace.step % options.sessions as u64) as usize];
                pace.step += 1;
                let connection = &mut connections[number];
                if !connection.over {
                    let stepped = connection.due(&options, place, due);
                    lose_if(stepped, connection, &poller, &mut figures)?;
                }
            }
        }
    }
    let cores = (cpu_s() - used.unwrap_or_default()) / options.time.as_secs_f64();
    let now = Instant::now();
    let living = connections.iter().filter(|one| !one.over);
    let oldest = living.map(|one| one.oldest(now)).max().unwrap_or_default();
    report(&options, figures, opened, oldest, cores);
    Ok(())
}

fn lose_if(
    done: Result<(), Failure>,
    connection: &mut Connection,
    poller: &Poller,
    figures: &mut Figures,
) -> Result<(), Failure> {
    if let Err(why) = done {
        poller.delete(connection.link.socket())?;
        connection.over = true;
        figures.failed(why.to_string());
    }
    Ok(())
}

fn due(options: &Options, pace: &Pace) -> Instant {
    let period = options.period.unwrap_or_default();
    pace.begun + period.mul_f64(pace.step as f64 / options.sessions as f64)
}

fn next_due(options: &Options, pace: &Pace, now: Instant) -> Option<Instant> {
    Some(due(options, pace)).filter(|due| *due <= now)
}

fn until_due(options: &Options, pace: &Pace) -> Duration {
    due(options, pace)
        .saturating_duration_since(Instant::now())
        .min(WAIT)
}

fn report(options: &Options, mut figures: Figures, opened: usize, oldest: Duration, cores: f64) {
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
    let mut reasons: Vec<_> = figures.reasons.iter().collect();
    reasons.sort_by_key(|(_, times)| std::cmp::Reverse(**times));
    let why: Vec<String> = reasons
        .iter()
        .take(REASONS)
        .map(|(why, times)| format!("{times} times: {why}"))
        .collect();
    println!(
        "{{\"sessions\": {}, \"connections\": {}, \"opened\": {opened}, \"steps_per_s\": {:.0}, \"p50_ms\": {:.3}, \"p99_ms\": {:.3}, \
         \"oldest_ms\": {:.3}, \"checked\": {}, \"greatest_error\": {:e}, \"outputs_equal\": {equal}, \"failures\": {}, \
         \"why\": \"{}\", \"client_cores\": {cores:.2}}}",
        options.sessions,
        options.connections,
        latencies.len() as f64 / options.time.as_secs_f64(),
        at(0.5),
        at(0.99),
        oldest.as_secs_f64() * 1000.0,
        figures.checked,
        if figures.error.is_nan() {
            f32::MAX
        } else {
            figures.error
        },
        figures.failures,
        json(&why.join("; ")),
    );
}

/// Text as it stands in a JSON string.
fn json(text: &str) -> String {
    text.chars()
        .map(|letter| match letter {
            '"' | '\\' => format!("\\{letter}"),
            letter if letter.is_control() => " ".into(),
            letter => letter.into(),
        })
        .collect()
}

/// Seconds of processor that this process has used.
fn cpu_s() -> f64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
