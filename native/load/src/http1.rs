//! Just enough of HTTP/1.1 to post one row to a server that has no gRPC, and to read its answer.

pub fn put_request(out: &mut Vec<u8>, path: &str, session: u64, input: &[u8]) {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
        8 + input.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(&session.to_le_bytes());
    out.extend_from_slice(input);
}

/// The body of the first answer, if it is whole, which is taken out of `bytes`. Err: an answer that is none.
pub fn answer(bytes: &mut Vec<u8>) -> Result<Option<Vec<u8>>, String> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .and_then(|value| value.trim().parse::<usize>().ok())
        .ok_or("an answer without a length")?;
    let Some(body) = bytes.get(end + 4..end + 4 + length) else {
        return Ok(None);
    };
    let body = body.to_vec();
    if !head.starts_with("http/1.1 200") {
        let line = head.lines().next().unwrap_or_default();
        return Err(format!("{line}: {}", String::from_utf8_lossy(&body)));
    }
    bytes.drain(..end + 4 + length);
    Ok(Some(body))
}
