//! Who a machine is, and what it is handed to become known to a server.
//!
//! An identity stands in the agent's certificate as the URI `strandline://<tenant>/<agent id>`, and nowhere else: a peer
//! is what its verified certificate says. Protocol names (ALPN), server addresses and the text of an enrolment token are
//! here because both sides must agree on them.
//!
//! Enrolment token, text: `strand1-` and the lower-case base32 (RFC 4648, no padding) of
//! `count u8 · addresses (length LEB128, UTF-8) · BLAKE3-256 of the authority's certificate (DER) 32 · secret 32 ·
//! first 8 bytes of BLAKE3-256 of everything before`.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use data_encoding::{BASE32_NOPAD, BASE64};
use serde::{Deserialize, Serialize};

use crate::format::cursor::{Decoder, Encoder};
use crate::ids::{AgentId, TenantName};
use crate::limits;

/// Application protocol (ALPN) of sessions: both sides prove themselves.
pub const ALPN_SESSION: &[u8] = b"strandline/1";
/// Application protocol (ALPN) of enrolment: only the server proves itself, against the hash in the token.
pub const ALPN_ENROLMENT: &[u8] = b"strandline-enroll/1";
/// The port, where an address names none.
pub const DEFAULT_PORT: u16 = 9847;

const URI_SCHEME: &str = "strandline://";
const TOKEN_PREFIX: &str = "strand1-";
const TOKEN_CHECKSUM_BYTES: usize = 8;
/// Longest token text that is looked at, bytes.
const TOKEN_TEXT_BYTES_MAX: usize = 16 << 10;

/// What a certificate entitles its holder to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A machine that backs up and restores inside its tenant.
    Agent,
}

/// Who a peer is, taken from its verified certificate alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The isolation unit it belongs to.
    pub tenant: TenantName,
    /// The machine.
    pub agent: AgentId,
    /// What it may be.
    pub role: Role,
}

impl Identity {
    /// The URI that stands in the certificate's subject alternative name.
    pub fn uri(&self) -> String {
        format!("{URI_SCHEME}{}/{}", self.tenant, self.agent)
    }

    /// Reads [`Self::uri`] back; anything that it would not print is refused.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let (tenant, agent) = uri.strip_prefix(URI_SCHEME)?.split_once('/')?;
        Some(Self { tenant: tenant.parse().ok()?, agent: agent.parse().ok()?, role: Role::Agent })
    }
}

/// Why a text is not a server address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a server address: write HOST:PORT, for example backup.example.com:{DEFAULT_PORT} or [2001:db8::1]:{DEFAULT_PORT}"
)]
pub struct AddressError {
    /// The text as given, cut to 80 characters.
    pub text: String,
}

/// Where a server is reached: a name or IP address, and a TCP port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerAddress {
    host: String,
    port: u16,
}

impl ServerAddress {
    /// The name or IP address, an IPv6 address without brackets. This is also the name that the certificate must carry.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host_port`, a legal file name: an IPv6 address's colons become `-`.
    pub fn directory_name(&self) -> String {
        format!("{}_{}", self.host.replace(':', "-"), self.port)
    }
}

impl FromStr for ServerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError { text: text.chars().take(80).collect() };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(error)?;
            host.parse::<Ipv6Addr>().map_err(|_| error())?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(error)?) })
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let is_v6 = host.contains(':');
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let starts_well = host.starts_with(|c: char| c.is_ascii_alphanumeric() || is_v6);
        if !starts_well || (!is_v6 && !host.chars().all(legal)) || host.len() > limits::FILE_NAME_BYTES_MAX - 8 {
            return Err(error());
        }
        let port = port.map_or(Ok(DEFAULT_PORT), str::parse).map_err(|_| error())?;
        if port == 0 {
            return Err(error());
        }
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl TryFrom<String> for ServerAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<ServerAddress> for String {
    fn from(address: ServerAddress) -> Self {
        address.to_string()
    }
}

/// What lets one machine enrol once. Never logged; a server keeps only its hash.
#[derive(Clone, PartialEq, Eq)]
pub struct EnrolmentSecret(pub [u8; 32]);

impl fmt::Debug for EnrolmentSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnrolmentSecret(…)")
    }
}

/// BLAKE3-256 of a server authority's certificate in DER: what a new machine trusts before it knows anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthorityHash(pub [u8; 32]);

impl AuthorityHash {
    /// The hash of a certificate in DER.
    pub fn of(certificate_der: &[u8]) -> Self {
        Self(*blake3::hash(certificate_der).as_bytes())
    }

    /// What the holder of a writer key signs of a connection instead of the bare nonce of the server's `Hello`. A server cannot
    /// have its clients prove themselves to a server of another authority, whose nonce it hands on.
    pub fn bind(&self, nonce: &[u8; 32]) -> [u8; 32] {
        blake3::derive_key("strandline 2026 nonce of a server v1", [*nonce, self.0].as_flattened())
    }
}

/// What an administrator hands to a new machine: one line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolmentToken {
    /// Where the server is reached, in order of preference; at least one.
    pub addresses: Vec<ServerAddress>,
    /// Whose certificates to believe.
    pub authority: AuthorityHash,
    /// The single-use secret.
    pub secret: EnrolmentSecret,
}

/// Why a text is not an enrolment token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin like one.
    #[error(
        "this is not an enrolment token: it begins with `{TOKEN_PREFIX}`; copy the whole line that `strand-server token create` printed"
    )]
    NotAToken,
    /// It is a token of another version.
    #[error("this enrolment token was made by a newer server: use a newer Strandline on this machine")]
    Version,
    /// A character that no token has.
    #[error(
        "the enrolment token contains `{character}`, which no token does: copy the whole line again, with nothing around it"
    )]
    Character {
        /// The first one.
        character: char,
    },
    /// The checksum does not match.
    #[error("the enrolment token is damaged: was it cut off when it was copied? Copy the whole line again")]
    Damaged,
}

impl fmt::Display for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(160);
        let addresses = self.addresses.iter().take(limits::DATA_ADDRESSES_MAX);
        bytes.put_u8(u8::try_from(addresses.len()).unwrap_or(u8::MAX));
        for address in addresses {
            bytes.put_string(address.to_string().as_bytes());
        }
        bytes.extend_from_slice(&self.authority.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend(checksum(&bytes));
        write!(f, "{TOKEN_PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }
}

impl FromStr for EnrolmentToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        if text.len() > TOKEN_TEXT_BYTES_MAX {
            return Err(TokenError::NotAToken);
        }
        // A mail program may have broken the line and a form may have capitalised it.
        let text: String = text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_lowercase()).collect();
        let Some(body) = text.strip_prefix(TOKEN_PREFIX) else {
            let other_version = text.strip_prefix("strand").and_then(|rest| rest.split_once('-'));
            return Err(match other_version {
                Some((version, _)) if version.parse::<u32>().is_ok() => TokenError::Version,
                _ => TokenError::NotAToken,
            });
        };
        if let Some(character) = body.chars().find(|c| !matches!(c, 'a'..='z' | '2'..='7')) {
            return Err(TokenError::Character { character });
        }
        let bytes = BASE32_NOPAD.decode(body.to_ascii_uppercase().as_bytes()).map_err(|_| TokenError::Damaged)?;
        let (payload, sum) = bytes.split_last_chunk::<TOKEN_CHECKSUM_BYTES>().ok_or(TokenError::Damaged)?;
        if checksum(payload) != *sum {
            return Err(TokenError::Damaged);
        }
        decode_payload(payload).ok_or(TokenError::Damaged)
    }
}

fn decode_payload(payload: &[u8]) -> Option<EnrolmentToken> {
    let mut decoder = Decoder::new(payload, "enrolment token");
    let count = usize::from(decoder.u8().ok()?);
    if count == 0 || count > limits::DATA_ADDRESSES_MAX {
        return None;
    }
    let mut addresses = Vec::with_capacity(count);
    for _ in 0..count {
        addresses.push(decoder.text("server address", limits::ADDRESS_BYTES_MAX).ok()?.parse().ok()?);
    }
    let authority = AuthorityHash(decoder.array().ok()?);
    let secret = EnrolmentSecret(decoder.array().ok()?);
    decoder.finish().ok()?;
    Some(EnrolmentToken { addresses, authority, secret })
}

fn checksum(bytes: &[u8]) -> [u8; TOKEN_CHECKSUM_BYTES] {
    let mut sum = [0; TOKEN_CHECKSUM_BYTES];
    sum.copy_from_slice(blake3::hash(bytes).as_bytes().split_at(TOKEN_CHECKSUM_BYTES).0);
    sum
}

/// A certificate in PEM (RFC 7468), so that other programs can read the file.
pub fn certificate_pem(certificate_der: &[u8]) -> String {
    let body = BASE64.encode(certificate_der);
    let mut pem = String::with_capacity(body.len() + body.len() / 64 + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    for (position, character) in body.chars().enumerate() {
        if position > 0 && position % 64 == 0 {
            pem.push('\n');
        }
        pem.push(character);
    }
    pem.push_str("\n-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> EnrolmentToken {
        EnrolmentToken {
            addresses: vec!["backup.example.com:9847".parse().unwrap(), "[2001:db8::1]:443".parse().unwrap()],
            authority: AuthorityHash([3; 32]),
            secret: EnrolmentSecret([4; 32]),
        }
    }

    #[test]
    fn an_identity_reads_back_from_its_uri_and_from_nothing_else() {
        let identity = Identity { tenant: "acme".parse().unwrap(), agent: AgentId([0xab; 16]), role: Role::Agent };
        assert_eq!(Identity::from_uri(&identity.uri()), Some(identity.clone()));
        let good = identity.uri();
        for bad in [
            good.to_uppercase(),
            format!("{good}/"),
            format!("{good}?x"),
            format!(" {good}"),
            good.replace("acme", "../acme"),
            good.replace("acme", ""),
            good.replace("strandline", "https"),
        ] {
            assert_eq!(Identity::from_uri(&bad), None, "{bad}");
        }
    }

    #[test]
    fn an_address_reads_back_and_has_a_default_port() {
        for (text, printed) in [
            ("backup.example.com", "backup.example.com:9847"),
            ("Backup:1", "backup:1"),
            ("10.0.0.1:65535", "10.0.0.1:65535"),
            ("[::1]", "[::1]:9847"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ] {
            let address: ServerAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse::<ServerAddress>().unwrap(), address);
            assert!(!address.directory_name().contains([':', '/']));
        }
        for bad in ["", ":1", "a:0", "a:65536", "a:b", "a b", "../x:1", "..:1", "[::1", "[x]:1", "[::1]x", "a:1:2", "é"]
        {
            assert!(bad.parse::<ServerAddress>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_token_reads_back_even_if_its_line_was_broken_or_capitalised() {
        let text = token().to_string();
        assert_eq!(text.parse::<EnrolmentToken>().unwrap(), token());
        let (head, tail) = text.split_at(70);
        assert_eq!(format!(" {head}\n  {tail}\n").to_uppercase().parse::<EnrolmentToken>().unwrap(), token());
    }

    #[test]
    fn s43_a_damaged_token_says_so_for_people() {
        let text = token().to_string();
        for cut in TOKEN_PREFIX.len()..text.len() {
            assert_eq!(text[..cut].parse::<EnrolmentToken>(), Err(TokenError::Damaged), "{cut}");
        }
        assert!(TokenError::Damaged.to_string().contains("cut off when it was copied?"));
        assert_eq!("hello".parse::<EnrolmentToken>(), Err(TokenError::NotAToken));
        assert_eq!("strand2-aaaa".parse::<EnrolmentToken>(), Err(TokenError::Version));
        assert_eq!(format!("{text}!").parse::<EnrolmentToken>(), Err(TokenError::Character { character: '!' }));
    }

    #[test]
    fn a_secret_is_never_printed() {
        assert!(!format!("{:?}", token()).contains("4, 4"));
    }

    proptest! {
        #[test]
        fn s43_no_text_panics(text: String, body in "[a-z2-7]{0,300}", flip in 8usize..200, to in "[a-z2-7]") {
            let _ = text.parse::<EnrolmentToken>();
            let _ = text.parse::<ServerAddress>();
            let _ = format!("{TOKEN_PREFIX}{body}").parse::<EnrolmentToken>();
            let mut bad = token().to_string();
            let flip = flip.min(bad.len() - 1);
            if bad[flip..=flip] != to {
                bad.replace_range(flip..=flip, &to);
                prop_assert!(bad.parse::<EnrolmentToken>() != Ok(token()) || flip == bad.len() - 1);
            }
        }
    }
}
