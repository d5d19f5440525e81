//! Whom TLS to Redis trusts: what is signed by a CA that was given, or by one of the system's, as Python's own TLS does it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

/// Errors are words.
pub fn client_config(
    ca: Option<&[u8]>,
    system: Vec<PathBuf>,
    pair: Option<(&[u8], &[u8])>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let given = match ca {
        None => vec![],
        Some(pem) => certificates(pem).map_err(|why| format!("the CAs' file: {why}"))?,
    };
    let verifier = Verifier {
        algorithms: provider.signature_verification_algorithms,
        provider: provider.clone(),
        given,
        system,
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous() // a verifier of our own, which asks the usual one
        .with_custom_certificate_verifier(Arc::new(verifier));
    let Some((certificate, key)) = pair else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate).map_err(|why| format!("the certificate: {why}"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key: {error}"))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| format!("certificate and key: {error}"))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(chain) if chain.is_empty() => Err("there is no certificate in it".into()),
        Ok(chain) => Ok(chain),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    provider: Arc<CryptoProvider>,
    given: Vec<CertificateDer<'static>>,
    system: Vec<PathBuf>, // read where nothing that was given has signed
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer,
        intermediates: &[CertificateDer],
        name: &ServerName,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.given.contains(end_entity) {
            // One that has signed itself, which the usual verifier takes for nobody's but a CA's.
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
            return match validity(end_entity, now) {
                Some(Validity::Now) => Ok(ServerCertVerified::assertion()),
                Some(Validity::Later) => Err(CertificateError::NotValidYet.into()),
                Some(Validity::Over) => Err(CertificateError::Expired.into()),
                None => Err(CertificateError::BadEncoding.into()),
            };
        }
        let verify = |authorities: Vec<CertificateDer<'static>>| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(
                authorities
                    .into_iter()
                    .filter(|authority| validity(authority, now) == Some(Validity::Now)),
            );
            if roots.is_empty() {
                return Err(CertificateError::UnknownIssuer.into());
            }
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                .build()
                .map_err(|error| Error::General(error.to_string()))?
                .verify_server_cert(end_entity, intermediates, name, ocsp, now)
        };
        match verify(self.given.clone()) {
            Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                verify(installed(&self.system))
            }
            outcome => outcome,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The certificates in files and directories, as far as they can be read.
fn installed(paths: &[PathBuf]) -> Vec<CertificateDer<'static>> {
    let mut found = vec![];
    for path in paths {
        let Ok(names) = std::fs::read_dir(path) else {
            read(path, &mut found);
            continue;
        };
        for entry in names.flatten() {
            if entry.file_name().to_str().is_some_and(hashed) {
                read(&entry.path(), &mut found);
            }
        }
    }
    found.sort_unstable_by(|one, two| one.as_ref().cmp(two.as_ref()));
    found.dedup(); // they mostly are in a file, and in a directory as well
    found
}

fn read(path: &Path, found: &mut Vec<CertificateDer<'static>>) {
    if let Ok(pem) = std::fs::read(path) {
        found.extend(CertificateDer::pem_slice_iter(&pem).flatten());
    }
}

/// Whether it is named as OpenSSL looks for it: e.g. 5ed36f99.0.
fn hashed(name: &str) -> bool {
    let (hash, number) = name.split_once('.').unwrap_or_default();
    hash.len() == 8
        && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[derive(Debug, PartialEq)]
enum Validity {
    Later,
    Now,
    Over,
}

/// None: it is no certificate.
fn validity(certificate: &[u8], now: UnixTime) -> Option<Validity> {
    let (_, whole, _) = element(certificate)?;
    let (_, mut fields, _) = element(whole)?;
    if fields.first() == Some(&0xa0) {
        fields = element(fields)?.2; // the version
    }
    for _ in ["serial", "signature", "issuer"] {
        fields = element(fields)?.2;
    }
    let (_, times, _) = element(fields)?;
    let (tag, from, rest) = element(times)?;
    let from = seconds(tag, from)?;
    let (tag, until, _) = element(rest)?;
    let until = seconds(tag, until)?;
    let now = i64::try_from(now.as_secs()).ok()?;
    Some(match now {
        now if now < from => Validity::Later,
        now if now > until => Validity::Over,
        _ => Validity::Now,
    })
}

/// The first element of DER: tag, contents, and what follows.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (digits, behind) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if digits.len() > 4 {
            return None;
        }
        length = digits
            .iter()
            .fold(0, |length, &digit| length << 8 | usize::from(digit));
        rest = behind;
    }
    let (contents, rest) = rest.split_at_checked(length)?;
    Some((tag, contents, rest))
}

/// Of a UTCTime (YYMMDDhhmmssZ) or a GeneralizedTime (YYYYMMDDhhmmssZ), since 1970.
fn seconds(tag: u8, text: &[u8]) -> Option<i64> {
    let digits = text.strip_suffix(b"Z")?;
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = digits.get(from..to)?;
        if !part.iter().all(u8::is_ascii_digit) {
            return None;
        }
        std::str::from_utf8(part).ok()?.parse().ok()
    };
    let (year, at) = match (tag, digits.len()) {
        (0x17, 12) => {
            let short = number(0, 2)?;
            (
                if short < 50 {
                    2000 + short
                } else {
                    1900 + short
                },
                2,
            )
        }
        (0x18, 14) => (number(0, 4)?, 4),
        _ => return None,
    };
    let part = |n: usize| number(at + 2 * n, at + 2 * n + 2);
    let (month, day) = (part(0)?, part(1)?);
    // Days since 1970 of the Gregorian calendar, whose years begin in March here: a leap day is the last one.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + part(2)? * 3600 + part(3)? * 60 + part(4)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        for (tag, text, expected) in [
            (0x17, "700101000000Z", 0),
            (0x17, "000229235959Z", 951_868_799),
            (0x17, "491231235959Z", 2_524_607_999),
            (0x17, "500101000000Z", -631_152_000),
            (0x18, "20500101000000Z", 2_524_608_000),
            (0x18, "99991231235959Z", 253_402_300_799),
        ] {
            assert_eq!(seconds(tag, text.as_bytes()), Some(expected), "{text}");
        }
        for (tag, text) in [
            (0x17, "7001010000Z"),
            (0x17, "700101000000+0100"),
            (0x18, "+0500101000000Z"),
            (0x18, "700101000000Z"),
            (0x02, "700101000000Z"),
            (0x17, ""),
        ] {
            assert_eq!(seconds(tag, text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_validity() {
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1));
        for wrong in [
            b"".as_slice(),
            b"\x30",
            b"\x30\x05\x30",
            b"\x30\x84\xff\xff\xff\xff\x30",
            b"\x30\x85\x01\x01\x01\x01\x01\x30",
            b"\x30\x02\x30\x00",
            b"\x30\x04\x30\x02\xa0\x00",
        ] {
            assert_eq!(validity(wrong, now), None, "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn names_of_openssl() {
        assert!(hashed("5ed36f99.0") && hashed("5ED36F99.12"));
        for other in [
            "5ed36f99",
            "5ed36f99.",
            "5ed36f99.r0",
            "ca.0",
            "",
            "ca-certificates.crt",
        ] {
            assert!(!hashed(other), "{other}");
        }
    }
}
