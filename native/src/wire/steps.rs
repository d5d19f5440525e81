//! Unary steps of sessions that Python has told of: each becomes a row, as steps of streams do, and its answer is encoded here.
//!
//! Such a row has the call's number with `CALL` in place of a stream's. What is unusual about a step stays an event, and Python may
//! make one of a row that it cannot use: `again`.

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::call::Call;
use super::frames::{Steps, put_head, put_number, put_prefix, sized};
use super::inbox::{Begun, Happening};
use super::requests::{Model, request};
use super::server::Server;
use super::status::Status;

/// In the number of a row's stream: a call brought it.
pub const CALL: u32 = 1 << 31;
const MARK: u8 = 0x1f; // stands in no tenant's name

/// Who may step, and the sessions of the server's own stream.
pub struct Known {
    table: RwLock<Table>,
    step_ms: u64, // that a step may take
}

#[derive(Default)]
struct Table {
    callers: Option<HashMap<u32, (String, f64)>>, // by identity: tenant, and until when, in seconds since 1970; None: all may
    sessions: HashMap<Vec<u8>, (u32, Arc<Model>)>, // by tenant and id: the handle
    handles: HashMap<u32, Vec<u8>>,
}

fn key(tenant: &[u8], id: &[u8]) -> Vec<u8> {
    [tenant, &[MARK], id].concat()
}

impl Known {
    pub fn new(step_s: f64) -> Self {
        Known {
            table: RwLock::default(),
            step_ms: (1000.0 * step_s) as u64,
        }
    }

    /// Replaces the table of callers that may step.
    pub fn set_callers(&self, callers: Option<HashMap<u32, (String, f64)>>) {
        self.table.write().callers = callers;
    }

    /// A session has this handle from now on.
    pub fn insert(&self, tenant: &[u8], id: &[u8], handle: u32, model: Arc<Model>) {
        let (mut table, key) = (self.table.write(), key(tenant, id));
        if let Some((before, _)) = table.sessions.insert(key.clone(), (handle, model)) {
            table.handles.remove(&before);
        }
        table.handles.insert(handle, key);
    }

    /// The handle is void.
    pub fn remove(&self, handle: u32) {
        let mut table = self.table.write();
        if let Some(key) = table.handles.remove(&handle) {
            table.sessions.remove(&key);
        }
    }

    fn find(&self, identity: Option<u32>, id: &[u8]) -> Option<(u32, Arc<Model>)> {
        let table = self.table.read();
        let tenant = match (&table.callers, identity) {
            (None, None) => &[][..],
            (Some(callers), Some(identity)) => {
                let (tenant, expires) = callers.get(&identity)?;
                let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
                if now.as_secs_f64() >= *expires {
                    return None;
                }
                tenant.as_bytes()
            }
            _ => return None,
        };
        table.sessions.get(&key(tenant, id)).cloned()
    }
}

/// What a call whose step is a row has asked for.
pub struct Asked {
    begun: Box<Begun>,
    message: Vec<u8>,
    came: Instant,
    model: Arc<Model>,
    given: bool, // its seq was
    prefill: bool,
    raw: bool,
}

impl Asked {
    /// A gRPC message with the StepResponse. None: the output is none of the model.
    fn response(&self, seq: u64, output: &[u8]) -> Option<Bytes> {
        let (output, shape) = match self.prefill {
            true => (&[][..], &[][..]),
            false if output.len() == self.model.output_nbytes => (output, &self.model.shape[..]),
            false => return None,
        };
        let mut data = BytesMut::with_capacity(32 + output.len() + shape.len());
        let mut number = BytesMut::with_capacity(11);
        number.put_u8(1 << 3);
        put_number(&mut number, seq);
        let field = if output.is_empty() {
            0
        } else {
            sized(output.len())
        };
        put_prefix(&mut data, number.len() + field + shape.len());
        data.put_slice(&number);
        if field > 0 {
            put_head(&mut data, if self.raw { 3 } else { 2 }, output.len());
            data.put_slice(output);
        }
        data.put_slice(shape);
        Some(data.freeze())
    }
}

impl Call {
    /// The one message of a unary step has come, whose first bytes were read then: a row where it can be one, else an event.
    pub fn step(&self, server: &Server, begun: Box<Begun>, message: Vec<u8>, read: u64) {
        let (inbox, known, counters) = (&server.inbox, &server.known, &server.counters);
        let found = request(&message).and_then(|request| {
            let (handle, model) = known.find(begun.identity, request.session)?;
            let input = model.input(&request)?;
            Some((request, handle, model, input))
        });
        let Some((request, handle, model, input)) = found else {
            counters.step_events.fetch_add(1, Relaxed);
            return self.tell(inbox, Happening::Step(begun, message));
        };
        let timeout_ms = begun.timeout_ms.unwrap_or(u64::MAX).min(known.step_ms);
        let mut asked = self.asked.lock(); // whoever has the answer waits until it is known what for
        let steps = Steps {
            handles: &handle.to_le_bytes(),
            seqs: &request.seq.to_le_bytes(),
            inputs: input,
            flags: &[u8::from(request.prefill)],
            // What came before has arrived; where the step has no seq, that is not known here.
            acknowledged: &request.seq.wrapping_sub(1).to_le_bytes(),
            timeout_ms: timeout_ms.clamp(1, u64::from(u32::MAX)) as u32,
        };
        counters.step_rows.fetch_add(1, Relaxed);
        inbox.push_steps(self.id | CALL, &steps, read);
        let (given, prefill, raw) = (request.seq > 0, request.prefill, request.raw);
        *asked = Some(Asked {
            begun,
            message,
            came: Instant::now(),
            model,
            given,
            prefill,
            raw,
        });
    }

    /// Answers the call's row. False: nobody is there to hear it.
    pub fn stepped(&self, seq: u64, output: &[u8]) -> bool {
        let Some(asked) = self.asked.lock().take() else {
            return false;
        };
        match asked.response(seq, output) {
            Some(message) => self.respond(message),
            None => {
                let why = "the answer does not fit the model; repeat the step with its seq";
                self.finish(Status::new(13, why));
                true
            }
        }
    }

    /// Brings the step as an event after all, where the caller has given its seq and `given`, or has given none and `numbered`.
    /// False: it is to be refused.
    pub fn again(&self, server: &Server, given: bool, numbered: bool) -> bool {
        let mut waiting = self.asked.lock();
        if !waiting
            .as_ref()
            .is_some_and(|asked| if asked.given { given } else { numbered })
        {
            return false;
        }
        if let Some(mut asked) = waiting.take() {
            let took = asked.came.elapsed().as_millis() as u64;
            let left = asked.begun.timeout_ms.map(|time| time.saturating_sub(took));
            asked.begun.timeout_ms = left;
            server.counters.step_events.fetch_add(1, Relaxed);
            let step = Happening::Step(asked.begun, asked.message);
            self.unless_over(|| self.tell(&server.inbox, step));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::times::{Times, Written};
    use super::*;

    fn model() -> Arc<Model> {
        let name = ("m".to_owned(), "2".to_owned());
        Arc::new(Model::new(name, (8, true), (4, true), &[1, 300]))
    }

    #[test]
    fn a_session_is_found_by_its_tenant_alone_while_the_token_is_good() {
        let known = Known::new(1.0);
        known.insert(b"a", b"id", 7, model());
        assert!(known.find(None, b"id").is_none());
        assert!(known.find(None, b"a\x1fid").is_none());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let (past, ahead) = (now.as_secs_f64() - 1.0, now.as_secs_f64() + 60.0);
        let callers = [(1, "a", ahead), (2, "b", ahead), (3, "a", past)];
        let callers = callers.map(|(number, tenant, until)| (number, (tenant.to_owned(), until)));
        known.set_callers(Some(HashMap::from(callers)));
        let found = |identity| known.find(identity, b"id").map(|(handle, _)| handle);
        assert_eq!(
            [Some(1), Some(2), Some(3), Some(4), None].map(found),
            [Some(7), None, None, None, None]
        );
        known.insert(b"a", b"id", 8, model());
        known.remove(7); // which was void by then
        assert_eq!(found(Some(1)), Some(8));
        known.remove(8);
        assert_eq!(found(Some(1)), None);
    }

    #[test]
    fn responses_are_those_of_protobuf() {
        let peer = Arc::new(super::super::server::Peer {
            address: String::new(),
            tls: None,
            times: Times::new(Arc::new(Written::new(&[]))),
        });
        let mut asked = Asked {
            begun: Box::new(Begun {
                path: String::new(),
                identity: None,
                metadata: vec![],
                timeout_ms: None,
                peer,
            }),
            message: vec![],
            came: Instant::now(),
            model: model(),
            given: true,
            prefill: false,
            raw: true,
        };
        let shape = [4 << 3 | 2, 3, 1, 0xac, 2];
        let body = [&[1 << 3, 0xac, 2, 3 << 3 | 2, 4, 9, 8, 7, 6][..], &shape].concat();
        let wanted = |body: &[u8]| [&[0, 0, 0, 0, body.len() as u8][..], body].concat();
        assert_eq!(asked.response(300, &[9, 8, 7, 6]).unwrap(), wanted(&body));
        asked.raw = false;
        let floats = [&body[..3], &[2 << 3 | 2], &body[4..]].concat();
        assert_eq!(asked.response(300, &[9, 8, 7, 6]).unwrap(), wanted(&floats));
        assert!(asked.response(300, &[9, 8, 7]).is_none());
        asked.prefill = true;
        assert_eq!(asked.response(300, &[]).unwrap(), wanted(&body[..3]));
        assert_eq!(
            asked.response(300, &[9, 8, 7, 6]).unwrap(),
            wanted(&body[..3])
        );
    }
}
