//! Texts as people write them.

use anyhow::{Context, Result};
use data_encoding::BASE32_NOPAD;
use strandline_agent::keys::format_recovery_key;
use strandline_messages::identity::Role;
use strandline_messages::{AgentId, AuthorityHash, EnrolmentSecret, EnrolmentToken, Identity};
use strandline_server::config::write_initial;

use super::{Seed, named};

pub(super) fn token() -> Result<Vec<Seed>> {
    let token = EnrolmentToken {
        addresses: vec!["backup.example.com:9847".parse()?, "[2001:db8::1]:443".parse()?],
        authority: AuthorityHash([3; 32]),
        secret: EnrolmentSecret([4; 32]),
    };
    let text = token.to_string();
    let body = text.strip_prefix("strand1-").context("not a token")?.to_ascii_uppercase();
    let payload = BASE32_NOPAD.decode(body.as_bytes())?;
    let payload = payload.get(..payload.len() - 8).unwrap_or_default();
    Ok(named([
        ("text", [&[0][..], text.as_bytes()].concat()),
        ("later", b"\0strand2-aaaa".to_vec()),
        ("payload", [&[1][..], payload].concat()),
    ]))
}

pub(super) fn names() -> Vec<Seed> {
    let identity = Identity {
        tenant: match "acme".parse() {
            Ok(tenant) => tenant,
            Err(_) => return Vec::new(),
        },
        agent: AgentId([3; 16]),
        role: Role::Agent,
    };
    let texts = [
        ("host", "Backup.example.com:9847"),
        ("v4", "10.0.0.1"),
        ("v6", "[2001:db8::1%1]:443"),
        ("repository", "acme/main-2_x.y"),
        ("dots", "../.."),
        ("hex", "0303030303030303030303030303030303030303030303030303030303030303"),
        ("size", "64MiB"),
        ("part", "3/7"),
        ("share", "12.5%"),
        ("marker", "CACHEDIR.TAG:Signature: 8a477f59"),
        ("setting", "min_retention=30days"),
        ("policy", "retention.keep_tags=a,b;c"),
        ("percent", "compact_below_percent=20"),
    ];
    let mut seeds = named(texts.map(|(name, text)| (name, text.into())));
    seeds.push(("identity".into(), identity.uri().into()));
    seeds.push(("recovery".into(), format_recovery_key(&[5; 32]).as_bytes().to_vec()));
    seeds
}

pub(super) fn patterns() -> Vec<Seed> {
    let texts = [
        ("names", "/home/ann/a.o\n*.o\n!keep.o\n/home/*/cache\n"),
        ("globs", "/a/b/c\n**/b/**\n[!a-c]?{x,y{1,2}}\n\\*literal\\\n"),
        ("ignore", "src/target/x\n# comment\ntarget/\n!/target/keep\n*.log \n/only/here\n"),
        ("odd", "/\u{e4}\n\n!\n[\n{a,b\n**\n"),
    ];
    named(texts.map(|(name, text)| (name, text.into())))
}

pub(super) fn server_configuration() -> Result<Vec<Seed>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("strand-server.toml");
    write_initial(&path, &["backup.example.com".to_owned()], &[], &["[2001:db8::1]:443".parse()?])?;
    let plain: String =
        std::fs::read_to_string(&path)?.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let variables =
        "max_streams = 3\n\0MAX_STREAMS=5\nLOG__FORMAT=json\nNAMES=a.example,b.example\nLISTEN=127.0.0.1:7\n";
    Ok(named([("initial", plain.into_bytes()), ("variables", variables.into())]))
}

pub(super) fn agent_configuration() -> Vec<Seed> {
    let text = "repository = \"strand://backup.example.com/main\"\npassword_file = \"/etc/secret\"\nhost = \"web\"\nstreams = 4\n\
                limit_upload = \"10M\"\nexclude = [\"*.o\", '/tmp']\nexclude_caches = true\none_file_system = false\n";
    named([("settings", text.into())])
}
