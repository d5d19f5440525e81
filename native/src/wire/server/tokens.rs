//! Who calls, by the token of the call.

use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

use crate::wire::refusals::Refusal;

/// A token is known by its SHA-256. None: no call needs one.
pub type Identities = Option<HashMap<[u8; 32], u32>>;

/// Who calls, by this table.
pub fn identity(identities: &Identities, headers: &HeaderMap) -> Result<Option<u32>, Refusal> {
    let Some(table) = identities else {
        return Ok(None);
    };
    let bearer = |value: &HeaderValue| {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        let token = token.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
            .then(|| <[u8; 32]>::from(Sha256::digest(token)))
    };
    let token = headers.get_all("authorization").iter().find_map(bearer);
    let token = token.ok_or(Refusal::TokenMissing)?;
    let found = table.get(&token).copied().map(Some);
    found.ok_or(Refusal::TokenUnknown)
}
