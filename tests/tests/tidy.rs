//! Rules about the source itself that no compiler checks: who may make bytes durable, which way dependencies point, and
//! that the documents of protocol and formats move with the code.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail their test by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file, lines.
const FILE_LINES_MAX: usize = 800;
/// What `actors` must not name (a file system, a database, TLS, sockets).
const FOREIGN_TO_ACTORS: [&str; 5] = ["rustls", "sqlx", "std::fs", "tokio::fs", "tokio::net"];
/// Each package and the packages of this workspace that it may depend on.
const MAY_DEPEND_ON: [(&str, &[&str]); 5] = [
    ("messages", &[]),
    ("actors", &["messages"]),
    ("server", &["messages", "actors"]),
    ("agent", &["messages", "actors", "server"]),
    ("tests", &["messages", "actors", "server", "agent"]),
];

struct Source {
    /// Relative to the workspace.
    path: String,
    text: String,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every `.rs` file of `packages`, `target` directories left out.
fn sources(packages: &[&str]) -> Vec<Source> {
    let root = workspace();
    let mut found = Vec::new();
    let mut pending: Vec<PathBuf> = packages.iter().map(|package| root.join(package)).collect();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().unwrap() != "target" {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no sources in {packages:?}");
    found
}

fn all_sources() -> Vec<Source> {
    sources(&MAY_DEPEND_ON.map(|(package, _)| package))
}

impl Source {
    /// Whether the whole file is test code, or a bench.
    fn is_test_file(&self) -> bool {
        let directory = self.path.contains("/tests/") || self.path.contains("/benches/");
        self.path.starts_with("tests/") || directory || self.path.ends_with("/tests.rs")
    }

    /// The text without comments, and without the module of unit tests, which closes a file.
    fn product_code(&self) -> String {
        without_comments(before_tests(&self.text))
    }
}

fn before_tests(text: &str) -> &str {
    let mut from = 0;
    while let Some(at) = text[from..].find("#[cfg(test)]").map(|at| from + at) {
        let next = text[at..].lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with("#["));
        if next.is_some_and(|line| line.starts_with("mod ") && line.ends_with('{')) {
            return &text[..at];
        }
        from = at + 1;
    }
    text
}

fn without_comments(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .fold(String::new(), |text, line| text + line + "\n")
}

/// Whether `code` names `path` (such as `std::fs`), directly or inside a `use std::{…}`.
fn names(code: &str, path: &str) -> bool {
    let compact: String = code.split_whitespace().collect();
    let ends_word = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    if compact.match_indices(path).any(|(at, _)| ends_word(&compact[at + path.len()..])) {
        return true;
    }
    let Some((krate, module)) = path.split_once("::") else { return false };
    let group = format!("{krate}::{{");
    compact.match_indices(&group).any(|(at, _)| {
        let (mut depth, mut item_begins) = (1, true);
        for (offset, c) in compact[at + group.len()..].char_indices() {
            let rest = &compact[at + group.len() + offset..];
            if depth == 1 && item_begins && rest.strip_prefix(module).is_some_and(ends_word) {
                return true;
            }
            depth += i32::from(c == '{') - i32::from(c == '}');
            item_begins = c == ',';
            if depth == 0 {
                break;
            }
        }
        false
    })
}

#[test]
fn exactly_one_type_can_make_bytes_durable() {
    let writers: Vec<String> = all_sources()
        .iter()
        .filter(|source| !source.is_test_file())
        .flat_map(|source| vec![source.path.clone(); source.product_code().matches("DurableWriter for").count()])
        .collect();
    assert!(writers.len() <= 1, "several implementations of DurableWriter: {writers:?}");
    // Until the storage exists there is no writer.
    let storage_exists =
        ["server/src/storage", "server/src/storage.rs"].iter().any(|path| workspace().join(path).exists());
    assert!(!storage_exists || writers.len() == 1, "no storage writer implements DurableWriter");
}

#[test]
fn actors_name_no_file_system_database_socket_or_tls_type() {
    for source in sources(&["actors"]) {
        let code = without_comments(&source.text);
        for foreign in FOREIGN_TO_ACTORS {
            assert!(!names(&code, foreign), "{} names {foreign}", source.path);
        }
    }
    let manifest = fs::read_to_string(workspace().join("actors/Cargo.toml")).unwrap();
    for line in manifest.lines() {
        let dependency = line.split(['.', '=', ' ']).next().unwrap_or_default();
        let foreign = ["rustls", "tokio-rustls", "sqlx", "rustix", "object_store", "tempfile", "xattr"];
        assert!(!foreign.contains(&dependency), "actors depends on {dependency}");
    }
}

#[test]
fn dependencies_point_one_way() {
    for (package, allowed) in MAY_DEPEND_ON {
        let manifest = fs::read_to_string(workspace().join(package).join("Cargo.toml")).unwrap();
        let mut in_dependencies = false;
        for line in manifest.lines().map(str::trim) {
            if line.starts_with('[') {
                in_dependencies = line.contains("dependencies");
            } else if in_dependencies && let Some(name) = line.strip_prefix("strandline-") {
                let name = name.split(['.', '=', ' ']).next().unwrap();
                assert!(allowed.contains(&name), "{package} must not depend on {name}");
            }
        }
    }
    for source in sources(&["agent"]) {
        if source.path != "agent/src/embedded.rs" && !source.is_test_file() {
            let code = without_comments(&source.text);
            // As a path: a log filter may name the crate.
            let uses = code.contains("strandline_server::") || code.contains("use strandline_server");
            assert!(!uses, "only embedded.rs may use the server, not {}", source.path);
        }
    }
}

#[test]
fn no_file_is_too_long() {
    for source in all_sources() {
        let lines = source.text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{} has {lines} lines, more than {FILE_LINES_MAX}: split it", source.path);
    }
}

/// Checks `wanted` against a document; `None` while the document does not exist yet.
fn document(name: &str) -> Option<String> {
    fs::read_to_string(workspace().join("docs").join(name)).ok()
}

#[test]
fn every_magic_is_in_the_format_document() {
    let magics: BTreeSet<String> =
        sources(&["messages"]).iter().filter(|s| s.path.contains("/format/")).flat_map(|s| magics(&s.text)).collect();
    assert!(magics.len() >= 8, "only {magics:?} found: has the way of writing a magic changed?");
    let Some(document) = document("FORMAT.md") else { return };
    for magic in magics {
        assert!(document.contains(&magic), "docs/FORMAT.md does not describe {magic}");
    }
}

/// The text of every `…_MAGIC: … = *b"…"`, its NUL bytes left out.
fn magics(text: &str) -> Vec<String> {
    let constants = before_tests(text).split("_MAGIC:").skip(1);
    let literal = |rest: &str| Some(rest.split(';').nth(1)?.split_once("b\"")?.1.split('"').next()?.to_owned());
    constants.filter_map(literal).map(|magic| magic.replace("\\0", "")).collect()
}

#[test]
fn every_frame_kind_is_in_the_protocol_document() {
    let sources = sources(&["messages"]);
    let wire = || sources.iter().filter(|source| source.path.contains("/wire/"));
    let kinds: BTreeSet<(String, u32)> = wire().flat_map(|source| frame_kinds(&source.text)).collect();
    let Some(document) = document("PROTOCOL.md") else { return };
    assert!(kinds.len() >= 30, "only {kinds:?} found in messages/src/wire: has the way of writing them changed?");
    let words = |line: &str| -> Vec<String> {
        line.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_ascii_lowercase).collect()
    };
    for (name, number) in kinds {
        let wanted = [number.to_string(), format!("{number:#x}"), format!("{number:#04x}"), format!("{number:#06x}")];
        let plain = name.to_ascii_lowercase().replace('_', "");
        let described = document.lines().map(words).any(|line| {
            line.iter().any(|word| word.replace('_', "") == plain) && line.iter().any(|word| wanted.contains(word))
        });
        assert!(described, "no line of docs/PROTOCOL.md has both {name} and its number {number} ({number:#x})");
    }
}

/// Names and numbers of frame kinds: the lines `number CONSTANT Variant…` of a `messages!` table, the constants of a
/// `mod kinds`, the variants `Name = number` of every enum whose name ends in `Kind`, and the constants of such a type or
/// called `KIND_…` (`pub const HELLO: FrameKind = FrameKind(1)`, `KIND_HELLO: u16 = 1`).
fn frame_kinds(text: &str) -> Vec<(String, u32)> {
    let code = without_comments(before_tests(text));
    let mut kinds = Vec::new();
    let (mut in_enum, mut in_kinds) = (false, false);
    for line in code.lines().map(str::trim) {
        if let Some(kind) = table_row(line) {
            kinds.push(kind);
        } else if let Some((_, rest)) = line.split_once("enum ") {
            in_enum = rest.split([' ', '{']).next().is_some_and(|name| name.ends_with("Kind"));
        } else if line.ends_with("mod kinds {") {
            in_kinds = true;
        } else if line == "}" {
            (in_enum, in_kinds) = (false, false);
        } else if let Some((_, constant)) = line.split_once("const ") {
            let Some((name, rest)) = constant.split_once(':') else { continue };
            let Some((kind, value)) = rest.split_once('=') else { continue };
            let name = match name.strip_prefix("KIND_") {
                Some(name) => name,
                None if in_kinds || kind.trim().ends_with("Kind") || kind.trim() == "Self" => name,
                None => continue,
            };
            let number = value.split(|c: char| !c.is_alphanumeric() && c != '_').find_map(number);
            kinds.extend(number.map(|number| (name.to_owned(), number)));
        } else if in_enum && let Some((name, value)) = line.split_once('=') {
            kinds.extend(number(value.trim().trim_end_matches(',')).map(|number| (name.trim().to_owned(), number)));
        }
    }
    kinds
}

/// A row of a `messages!` table: `0x0040 JOIN Join(Join),`.
/// Scenarios that need what version 1 does not have: a cluster, or an object store. 40 was never given to one.
const SCENARIOS_LEFT_OUT: [u32; 4] = [34, 35, 36, 40];
const SCENARIO_LAST: u32 = 54;

#[test]
fn every_scenario_has_a_test_and_every_test_that_the_reliability_document_names_exists() {
    let mut tests = BTreeSet::new();
    for source in all_sources() {
        let named = source.text.split("fn s").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            format!("s{}", &rest[..end])
        });
        tests.extend(named.filter(|name| is_scenario_test(name)));
    }
    for scenario in (1..=SCENARIO_LAST).filter(|number| !SCENARIOS_LEFT_OUT.contains(number)) {
        let tag = format!("s{scenario:02}_");
        assert!(tests.iter().any(|test| test.contains(&tag)), "scenario {scenario} has no test");
    }
    let text = document("RELIABILITY.md").unwrap();
    let named: Vec<&str> = text.split('`').skip(1).step_by(2).filter(|name| is_scenario_test(name)).collect();
    assert!(named.len() > 50, "{named:?}");
    for name in named {
        assert!(tests.contains(name), "docs/RELIABILITY.md names {name}, which is not there");
    }
}

/// Whether this is a name like `s07_…`.
fn is_scenario_test(name: &str) -> bool {
    let number = name.strip_prefix('s').and_then(|rest| rest.split_once('_')).map(|(number, _)| number);
    number.is_some_and(|number| number.len() == 2 && number.parse::<u32>().is_ok())
}

fn table_row(line: &str) -> Option<(String, u32)> {
    let mut words = line.split_whitespace();
    let (value, name, variant) = (number(words.next()?)?, words.next()?, words.next()?);
    let is_constant = name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    (is_constant && variant.starts_with(|c: char| c.is_ascii_uppercase())).then(|| (name.to_owned(), value))
}

fn number(text: &str) -> Option<u32> {
    let text = text.replace('_', "");
    let text = text.trim_end_matches("u16").trim_end_matches("u8");
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok())
}

#[test]
fn the_rules_themselves_notice_what_they_forbid() {
    assert!(names("use std::fs;", "std::fs"));
    assert!(names("use std::{\n    collections::{BTreeMap, btree_map},\n    fs::File,\n};", "std::fs"));
    assert!(names("tokio::net::TcpStream::connect()", "tokio::net"));
    assert!(!names("use std::{fmt, io}; use std::fsx; mod a { pub mod fs {} }", "std::fs"));
    assert!(!names("use std::{collections::{fs}}", "std::fs"));
    assert!(!names(&without_comments("a(); // rustls does that\n"), "rustls"));

    let text = "fn a() {}\n#[cfg(test)]\nfn helper() {}\n#[cfg(test)]\n#[expect(x)]\nmod tests {\n impl DurableWriter for X {}\n}";
    assert!(before_tests(text).contains("helper") && !before_tests(text).contains("DurableWriter"));

    let text = "pub const PACK_MAGIC: [u8; 8] = *b\"STRPACK\\0\";\npub const X: u8 = 1;";
    assert_eq!(magics(text), ["STRPACK"]);
    let text = "pub enum FrameKind {\n    Hello = 1,\n    Block = 0x0102, // raw\n}\nenum Other {\n    A = 9,\n}\n\
                pub const KIND_ACK: u16 = 7;\npub const DRAIN: FrameKind = FrameKind(8);\nconst MAX: usize = 3;";
    let expected = [("Hello", 1), ("Block", 258), ("ACK", 7), ("DRAIN", 8)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(frame_kinds(text), expected);
    let text = "messages! {\n    /// Joins.\n    0x0040 JOIN Join(Join), // first\n    0x0041 JOINED Joined,\n}\n\
                pub mod kinds {\n    pub const BLOCK: u16 = 0x0042;\n}\nconst OTHER: u16 = 7;\n1 x Y\n";
    let expected = [("JOIN", 0x40), ("JOINED", 0x41), ("BLOCK", 0x42)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(frame_kinds(text), expected);
}
