//! Where the corpora begin: small inputs that the real encoders make, and those of the fixtures.
//!
//! `cargo test -p strandline-tests --test fuzzing -- --ignored` writes them to `tests/fuzz/corpus`. All but certificates
//! come out the same each time.

mod disk;
mod messages;
mod texts;
mod trees;

/// A name, and an input for the target that was asked for.
pub type Seed = (String, Vec<u8>);

/// The seeds of the target called `name`; none if there is no such target.
pub fn of(name: &str) -> anyhow::Result<Vec<Seed>> {
    Ok(match name {
        "handshake" => messages::handshake()?,
        "frames" => messages::frames()?,
        "messages" => messages::messages()?,
        "operations" => messages::operations()?,
        "machines" => messages::machines(),
        "certificates" => disk::certificates()?,
        "block" => disk::block()?,
        "sealed" => disk::sealed()?,
        "manifest" => disk::manifest()?,
        "details" => disk::details(),
        "key_slot" => disk::key_slot()?,
        "keyset" => disk::keyset(),
        "receipt" => disk::receipt()?,
        "repository_file" => disk::repository_file()?,
        "pack" => disk::pack()?,
        "file_cache" => disk::file_cache()?,
        "journal" => disk::journal()?,
        "index" => disk::index()?,
        "tree" => trees::tree(),
        "restore" | "export" => trees::snapshots(),
        "token" => texts::token()?,
        "names" => texts::names(),
        "patterns" => texts::patterns(),
        "server_configuration" => texts::server_configuration()?,
        "agent_configuration" => texts::agent_configuration(),
        _ => Vec::new(),
    })
}

fn named<const N: usize>(seeds: [(&str, Vec<u8>); N]) -> Vec<Seed> {
    seeds.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}
