//! Hostile bytes for everything that decodes them: one function for each target, used by the test `fuzzing` and by the
//! coverage-guided campaign in `tests/fuzz`.
//!
//! Every target has the same oracle first: no panic, no endless work, and no more memory than [`memory::within`] is told;
//! then its own, stated at its function: mostly that what was decoded is encoded to the same bytes, or, where a format
//! lets a number be written longer than it must be, to bytes that are decoded to the same again.
//!
//! Digests would turn every mutation away at the door, so targets of formats that end in one look at the bytes as they are
//! and once more with the digest made right: what somebody sends who computes it.

#![expect(clippy::panic, clippy::missing_panics_doc, reason = "an oracle says what does not hold by panicking")]

mod certificates;
mod configuration;
mod files;
mod formats;
mod keys;
mod machines;
pub mod memory;
pub mod mutations;
mod restore;
mod scratch;
mod sealed;
pub mod seeds;
mod snapshot;
mod texts;
mod wire;

/// Something that decodes bytes which others wrote.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also that of its corpus.
    pub name: &'static str,
    /// Decodes the bytes and compares; panics if something does not hold.
    pub run: fn(&[u8]),
    /// Longest input worth trying, bytes.
    pub bytes_max: usize,
    /// Mutated inputs that an ordinary test run tries: about a second's worth.
    pub runs: u64,
}

/// All targets, those first in which a fault would be the worst: before anybody has proved who they are, then on the
/// network, then in what is restored, then in what lies on disk.
pub const TARGETS: [Target; 26] = [
    Target { name: "handshake", run: wire::handshake, bytes_max: 4096, runs: 200_000 },
    Target { name: "frames", run: wire::frames, bytes_max: 4096, runs: 200_000 },
    Target { name: "certificates", run: certificates::certificates, bytes_max: 4096, runs: 100_000 },
    Target { name: "messages", run: wire::messages, bytes_max: 4096, runs: 300_000 },
    Target { name: "operations", run: wire::operations, bytes_max: 4096, runs: 300_000 },
    Target { name: "machines", run: machines::machines, bytes_max: 1024, runs: 50_000 },
    Target { name: "block", run: formats::block, bytes_max: 4096, runs: 200_000 },
    Target { name: "sealed", run: sealed::sealed, bytes_max: 4096, runs: 30_000 },
    Target { name: "tree", run: formats::tree, bytes_max: 4096, runs: 300_000 },
    Target { name: "restore", run: restore::restore, bytes_max: 4096, runs: 1500 },
    Target { name: "export", run: restore::export, bytes_max: 4096, runs: 1500 },
    Target { name: "manifest", run: formats::manifest, bytes_max: 4096, runs: 300_000 },
    Target { name: "details", run: formats::details, bytes_max: 4096, runs: 300_000 },
    Target { name: "key_slot", run: keys::key_slot, bytes_max: 1024, runs: 200_000 },
    Target { name: "keyset", run: keys::keyset, bytes_max: 512, runs: 300_000 },
    Target { name: "receipt", run: formats::receipt, bytes_max: 512, runs: 300_000 },
    Target { name: "repository_file", run: formats::repository_file, bytes_max: 512, runs: 200_000 },
    Target { name: "token", run: texts::token, bytes_max: 1024, runs: 150_000 },
    Target { name: "names", run: texts::names, bytes_max: 512, runs: 50_000 },
    Target { name: "patterns", run: configuration::patterns, bytes_max: 512, runs: 2500 },
    Target { name: "server_configuration", run: configuration::server, bytes_max: 2048, runs: 15_000 },
    Target { name: "agent_configuration", run: configuration::agent, bytes_max: 2048, runs: 15_000 },
    Target { name: "pack", run: files::pack, bytes_max: 4096, runs: 20_000 },
    Target { name: "file_cache", run: files::file_cache, bytes_max: 4096, runs: 20_000 },
    Target { name: "journal", run: files::journal, bytes_max: 2048, runs: 15_000 },
    Target { name: "index", run: files::index, bytes_max: 12_288, runs: 15_000 },
];

/// The target called `name`.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
