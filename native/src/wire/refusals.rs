//! What the wire itself refuses, in the words of whoever made it: Python knows the reasons, and encodes them once.

use std::collections::HashMap;

use super::status::Status;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Refusal {
    TokenMissing,
    TokenUnknown,
    /// The token of a call that is under way.
    TokenRevoked,
    /// As many calls as allowed are relayed.
    QueueFull,
    /// The server behind is not there.
    RelayUnavailable,
}

use Refusal::*;

const ALL: [(&str, Refusal, u16, &str); 5] = [
    (
        "TOKEN_MISSING",
        TokenMissing,
        16,
        "this server asks for a token: metadata authorization: Bearer TOKEN",
    ),
    (
        "TOKEN_UNKNOWN",
        TokenUnknown,
        16,
        "this token is not known, or was revoked",
    ),
    (
        "TOKEN_REVOKED",
        TokenRevoked,
        16,
        "the call's token is not valid any more",
    ),
    (
        "QUEUE_FULL",
        QueueFull,
        8,
        "as many calls are under way as this server takes; call again",
    ),
    (
        "RELAY_UNAVAILABLE",
        RelayUnavailable,
        14,
        "what answers this call is not there just now; call again",
    ),
];

/// The status for each of them.
pub struct Refusals(HashMap<Refusal, Status>);

impl Refusals {
    /// `given`: by name, in place of what is said otherwise. Err: a name that there is not.
    pub fn new(given: HashMap<String, Status>) -> Result<Self, String> {
        let mut statuses: HashMap<_, _> = ALL
            .iter()
            .map(|(_, refusal, code, words)| (*refusal, Status::new(*code, *words)))
            .collect();
        for (name, status) in given {
            let (_, refusal, ..) =
                ALL.iter()
                    .find(|(known, ..)| *known == name)
                    .ok_or_else(|| {
                        let names = ALL.map(|(known, ..)| known).join(", ");
                        format!("there is no refusal {name:?}; there are {names}")
                    })?;
            statuses.insert(*refusal, status);
        }
        Ok(Refusals(statuses))
    }

    pub fn status(&self, refusal: Refusal) -> Status {
        self.0[&refusal].clone()
    }
}
