//! Texts that people copy, type or are sent: tokens, addresses, names, recovery keys.

use std::fmt::Display;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use strandline_agent::keys::{format_recovery_key, parse_recovery_key};
use strandline_agent::scan::markers::Marker;
use strandline_messages::{
    AgentId, ChunkId, EnrolmentToken, Identity, RepositoryName, ServerAddress, SnapshotId, TenantName, limits,
};
use strandline_server::admin::values::{RepositoryPath, change_setting, parse_size, parse_subset};
use strandline_server::engine::settings::RepositorySettings;

use super::formats::decoded_memory;
use super::memory::within;

/// First byte: even, and the rest is the text of a token; odd, and the rest is what a token holds, under a right checksum.
///
/// A token that is read is printed to one that is read as the same.
pub fn token(data: &[u8]) {
    let Some((&form, rest)) = data.split_first() else { return };
    let text = if form % 2 == 0 {
        String::from_utf8_lossy(rest).into_owned()
    } else {
        let sum = blake3::hash(rest);
        let payload = [rest, sum.as_bytes().get(..8).unwrap_or_default()].concat();
        format!("strand1-{}", BASE32_NOPAD.encode(&payload).to_ascii_lowercase())
    };
    let read = within(decoded_memory(text.len()), || text.parse::<EnrolmentToken>());
    if let Ok(token) = read {
        assert!((1..=limits::DATA_ADDRESSES_MAX).contains(&token.addresses.len()));
        assert_eq!(token.to_string().parse(), Ok(token));
    }
}

/// Any text as everything that is read from a word: each is printed to a text that is read as the same, and none that
/// becomes a file name could leave its directory.
pub fn names(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    within(decoded_memory(text.len()), || {
        if let Some(address) = reads_back::<ServerAddress>(&text) {
            super::formats::check_name(address.directory_name().as_bytes());
        }
        if let Some(name) = reads_back::<TenantName>(&text) {
            super::formats::check_name(name.as_str().as_bytes());
        }
        if let Some(name) = reads_back::<RepositoryName>(&text) {
            super::formats::check_name(name.as_str().as_bytes());
        }
        reads_back::<RepositoryPath>(&text);
        reads_back::<AgentId>(&text);
        reads_back::<ChunkId>(&text);
        reads_back::<SnapshotId>(&text);
        if let Some(identity) = Identity::from_uri(&text) {
            assert_eq!(identity.uri(), text);
        }
        if let Ok(key) = parse_recovery_key(&text) {
            let printed = format_recovery_key(&key);
            assert!(parse_recovery_key(&printed).is_ok_and(|again| *again == *key));
        }
        if let Some(marker) = Marker::parse(&text) {
            assert!(!marker.name.contains(&b'/'));
        }
        // Sizes and shares have no one form to be printed in.
        let _ = (parse_size(&text), parse_subset(&text));
        if let Some((key, value)) = text.split_once('=')
            && let Ok(changed) = change_setting(&RepositorySettings::default(), key, value)
        {
            assert!(changed.compact_below_percent <= 100);
        }
    });
}

fn reads_back<T: FromStr + Display + PartialEq>(text: &str) -> Option<T> {
    let read: T = text.parse().ok()?;
    assert!(read.to_string().parse().is_ok_and(|again: T| again == read), "{text:?} reads as `{read}`");
    Some(read)
}
