//! Files of one record: manifest, receipt, key slot, repository file.

use std::path::Path;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use strandline_messages::format::keys::{KEYS_VERSION, SLOT_MAGIC};
use strandline_messages::format::manifest::{MANIFEST_MAGIC, MANIFEST_VERSION, SIGNATURE_BYTES, snapshot_id};
use strandline_messages::format::receipt::{RECEIPT_MAGIC, RECEIPT_VERSION};
use strandline_messages::format::repository::{REPOSITORY_MAGIC, REPOSITORY_VERSION};
use strandline_messages::limits;

use super::{Inspection, Walker};

const CAPABILITIES: [&str; 3] = ["full", "write only", "read only"];
const KINDS: [&str; 2] = ["data", "tree"];

/// A snapshot's manifest: its visible part, and that its signature is its writer's.
pub(super) fn manifest(bytes: &[u8], base: u64, path: &Path) -> Inspection {
    let mut walker = Walker::new("manifest", bytes, base);
    let id = snapshot_id(bytes).to_string();
    walker.note(base, bytes.len(), "snapshot id", id.clone());
    if bytes.len() > limits::MANIFEST_BYTES_MAX {
        walker.problem(base, format!("{} bytes are more than the limit {}", bytes.len(), limits::MANIFEST_BYTES_MAX));
    }
    let named = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| base == 0 && stem.len() == id.len());
    if named.is_some_and(|named| named != id) {
        walker
            .problem(base, "the file's name is another id than that of its bytes: they are damaged, or it was renamed");
    }
    // What is noted is the result; where it stopped, a problem says why.
    let _ = manifest_fields(&mut walker);
    walker.finish()
}

fn manifest_fields(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(MANIFEST_MAGIC)?;
    walker.version(MANIFEST_VERSION)?;
    walker.hex("repository id", 16)?;
    walker.choice("kind of root", 1, &KINDS)?;
    walker.hex("root", 32)?;
    let offset = walker.offset();
    let flags = walker.choice("flags", 0, &["none", "error list", "parent", "error list and parent"])?;
    if flags > 3 {
        walker.problem(offset, "unknown flags: nothing behind them can be told apart");
        return None;
    }
    if flags & 1 != 0 {
        walker.choice("kind of error list", 1, &KINDS)?;
        walker.hex("error list", 32)?;
    }
    if flags & 2 != 0 {
        walker.hex("parent", 32)?;
    }
    walker.time("started")?;
    walker.time("finished")?;
    walker.text("job", limits::NAME_BYTES_MAX)?;
    walker.text("host", limits::FILE_NAME_BYTES_MAX)?;
    for _ in 0..walker.length("number of tags", limits::TAGS_MAX)? {
        walker.text("tag", limits::TAG_BYTES_MAX)?;
    }
    for name in ["files", "directories", "others", "bytes", "files read", "bytes new", "bytes stored", "errors"] {
        walker.leb(name)?;
    }
    walker.choice("writer's capability", 1, &CAPABILITIES)?;
    let key = walker.hex("writer's public key", 32)?;
    walker.hex("signature of the root key", SIGNATURE_BYTES)?;
    walker.choice("wrap algorithm", 1, &["X25519 HPKE"])?;
    let length = walker.length("length of wrapped data key", limits::WRAPPED_KEY_BYTES_MAX)?;
    walker.sealed("wrapped data key", length)?;
    walker.hex("salt", 32)?;
    walker.hex("key commitment", 32)?;
    let length = walker.length("length of details", limits::MANIFEST_BYTES_MAX)?;
    walker.sealed("details", length)?;
    signature(walker, key, "it is not the writer's over these bytes")
}

/// An Ed25519 signature of `key` over everything before it.
fn signature(walker: &mut Walker<'_>, key: &[u8], wrong: &str) -> Option<()> {
    let signed = walker.bytes.get(..walker.at).unwrap_or_default();
    let offset = walker.offset();
    let signature = walker.hex("signature", SIGNATURE_BYTES)?;
    if UnparsedPublicKey::new(&ED25519, key).verify(signed, signature).is_err() {
        walker.problem(offset, format!("the signature is wrong: {wrong}"));
    }
    Some(())
}

/// A snapshot's receipt, and that its signature is that of the server key in it.
pub(super) fn receipt(bytes: &[u8], base: u64) -> Inspection {
    let mut walker = Walker::new("receipt", bytes, base);
    let _ = receipt_fields(&mut walker);
    walker.finish()
}

fn receipt_fields(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(RECEIPT_MAGIC)?;
    walker.version(RECEIPT_VERSION)?;
    walker.hex("repository id", 16)?;
    walker.hex("snapshot id", 32)?;
    walker.u64("order")?;
    walker.time("committed")?;
    walker.hex("agent id", 16)?;
    let key = walker.hex("server's public key", 32)?;
    signature(walker, key, "it is not that server's over these bytes")
}

/// A key slot: everything but the keyset in it.
pub(super) fn slot(bytes: &[u8], base: u64) -> Inspection {
    let mut walker = Walker::new("slot", bytes, base);
    let _ = slot_fields(&mut walker);
    walker.finish()
}

fn slot_fields(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(SLOT_MAGIC)?;
    walker.version(KEYS_VERSION)?;
    walker.hex("repository id", 16)?;
    walker.hex("slot id", 16)?;
    walker.time("created")?;
    walker.text("label", limits::TAG_BYTES_MAX)?;
    walker.choice("kind", 1, &["key file", "passphrase", "recovery key"])?;
    walker.u32("Argon2id memory, KiB")?;
    walker.u32("Argon2id passes")?;
    walker.u32("Argon2id lanes")?;
    walker.hex("salt", 32)?;
    let length = walker.length("length of keyset", limits::KEY_SLOT_BYTES_MAX)?;
    walker.sealed("keyset", length)?;
    walker.digest("digest", 0)
}

/// A repository file.
pub(super) fn repository(bytes: &[u8], base: u64) -> Inspection {
    let mut walker = Walker::new("repository", bytes, base);
    let _ = repository_fields(&mut walker);
    walker.finish()
}

fn repository_fields(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(REPOSITORY_MAGIC)?;
    walker.version(REPOSITORY_VERSION)?;
    walker.hex("repository id", 16)?;
    walker.text("name", limits::NAME_BYTES_MAX)?;
    walker.time("created")?;
    walker.hex("root public key", 32)?;
    walker.choice("wrap algorithm", 1, &["X25519 HPKE"])?;
    walker.hex("KEM public key", 32)?;
    walker.choice("chunker", 1, &["FastCDC v2020"])?;
    for name in ["minimum chunk", "average chunk", "maximum chunk", "block plaintext"] {
        walker.u32(name)?;
    }
    walker.digest("digest", 0)
}
