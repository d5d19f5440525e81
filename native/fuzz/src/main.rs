//! Hostile bytes against the targets of wire/fuzzing.rs, without a guide: valid inputs made at random, most of them changed.
//!
//!     cargo run --release -p engram-fuzz -- [--seconds 120] [--seed 1] [--findings DIR] [TARGET ...]
//!     cargo run --release -p engram-fuzz -- --replay FILE TARGET
//!     cargo run --release -p engram-fuzz -- --corpus DIR      inputs for `cargo fuzz run TARGET --features guided DIR/TARGET`
//!
//! An input that makes a target fail, or that takes too long, ends the process; it is kept and named.

mod inputs;
mod random;

use engram_native::wire::fuzzing::{self, Peers};
use random::Random;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{abort, exit};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fs, panic, thread};

const SLOW: Duration = Duration::from_secs(30); // for one input; the machine may be busy
const CORPUS: usize = 200; // inputs of a target

/// How much of the input was taken.
type Run = Box<dyn Fn(&[u8]) -> usize>;

struct Target {
    name: &'static str,
    make: fn(&mut Random) -> Vec<u8>,
    run: Run,
}

/// What is being run, and since when: for who finds that it failed.
static RUNNING: Mutex<Option<(&'static str, Vec<u8>, Instant)>> = Mutex::new(None);

struct Options {
    seconds: f64,
    seed: u64,
    findings: PathBuf,
    replay: Option<PathBuf>,
    corpus: Option<PathBuf>,
    targets: Vec<String>,
}

fn main() {
    let options = options().unwrap_or_else(|error| {
        eprintln!("engram-fuzz: {error}");
        exit(2)
    });
    let all = targets();
    if let Some(unknown) = options
        .targets
        .iter()
        .find(|name| all.iter().all(|target| target.name != **name))
    {
        eprintln!("engram-fuzz: there is no target {unknown}");
        exit(2);
    }
    keep_findings(options.findings.clone());
    for target in all {
        if !options.targets.is_empty() && !options.targets.iter().any(|name| name == target.name) {
            continue;
        }
        match (&options.replay, &options.corpus) {
            (Some(file), _) => {
                let data = fs::read(file).expect("the input can be read");
                println!("{}: {} came of it", target.name, (target.run)(&data));
            }
            (_, Some(directory)) => write_corpus(&target, &directory.join(target.name)),
            _ => fuzz(&target, options.seconds, options.seed),
        }
    }
}

fn targets() -> [Target; 3] {
    let peers = Peers::default();
    [
        Target {
            name: "steps",
            make: inputs::steps,
            run: Box::new(fuzzing::steps),
        },
        Target {
            name: "messages",
            make: inputs::messages,
            run: Box::new(fuzzing::messages),
        },
        Target {
            name: "connection",
            make: inputs::connection,
            run: Box::new(move |data| peers.connection(data)),
        },
    ]
}

fn fuzz(target: &Target, seconds: f64, seed: u64) {
    let (start, mut random) = (Instant::now(), Random(seed));
    let (mut count, mut deep) = (0u64, 0u64);
    while start.elapsed().as_secs_f64() < seconds {
        let mut data = (target.make)(&mut random);
        if !random.one_in(4) {
            random.change(&mut data);
        }
        *RUNNING.lock().unwrap() = Some((target.name, data.clone(), Instant::now()));
        deep += u64::from((target.run)(&data) > 0);
        count += 1;
    }
    *RUNNING.lock().unwrap() = None;
    let took = start.elapsed().as_secs_f64();
    println!(
        "{}: {count} inputs in {took:.0} s, {deep} of them with something that was taken; no finding",
        target.name
    );
}

/// Whatever panics, in whichever thread or task, or takes too long, is a finding.
fn keep_findings(directory: PathBuf) {
    let (usual, kept) = (panic::take_hook(), directory.clone());
    panic::set_hook(Box::new(move |info| {
        usual(info);
        keep(&kept);
        abort()
    }));
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let late = match &*RUNNING.lock().unwrap() {
                Some((_, _, since)) => since.elapsed() > SLOW,
                None => false,
            };
            if late {
                eprintln!("one input takes more than {} s", SLOW.as_secs());
                keep(&directory);
                abort()
            }
        }
    });
}

fn keep(directory: &Path) {
    let Some((name, data, _)) = RUNNING.lock().unwrap().take() else {
        return;
    };
    let mut hasher = DefaultHasher::new();
    data.hash(&mut hasher);
    let path = directory.join(format!("{name}-{:016x}", hasher.finish()));
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, &data));
    match written {
        Ok(()) => eprintln!("{name}: the input is in {}", path.display()),
        Err(error) => eprintln!("{name}: {}: {error}; the input: {data:?}", path.display()),
    }
}

fn write_corpus(target: &Target, directory: &Path) {
    fs::create_dir_all(directory).expect("the corpus can be written");
    for number in 0..CORPUS {
        let data = (target.make)(&mut Random(number as u64));
        fs::write(directory.join(format!("{number:03}")), data).expect("the corpus can be written");
    }
}

fn options() -> Result<Options, lexopt::Error> {
    use lexopt::prelude::*;
    let mut options = Options {
        seconds: 120.0,
        seed: 1,
        findings: "../runs/fuzz/native".into(),
        replay: None,
        corpus: None,
        targets: vec![],
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("seconds") => options.seconds = parser.value()?.parse()?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("findings") => options.findings = parser.value()?.into(),
            Long("replay") => options.replay = Some(parser.value()?.into()),
            Long("corpus") => options.corpus = Some(parser.value()?.into()),
            Value(name) => options.targets.push(name.string()?),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else the targets would be run on what is refused at once.
    #[test]
    fn most_inputs_get_deep_and_changed_ones_find_nothing() {
        for target in targets() {
            let mut random = Random(1);
            let mut deep = 0;
            for _ in 0..300 {
                let mut data = (target.make)(&mut random);
                deep += usize::from((target.run)(&data) > 0);
                random.change(&mut data);
                (target.run)(&data);
            }
            assert!(deep > 100, "{}: {deep} of 300", target.name);
        }
    }
}
