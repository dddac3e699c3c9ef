//! What people write for the programs: configuration files, and patterns of what to leave out.

use std::ffi::OsString;

use strandline_agent::cli::Settings;
use strandline_agent::scan::exclude::Excludes;
use strandline_agent::scan::ignore_file::Rules;
use strandline_messages::limits;
use strandline_server::config::Config;

use super::memory::within;
use super::scratch;

/// What reading a configuration may take of memory: the file is small, its values are copied a few times.
const CONFIGURATION_BYTES: usize = 4 << 20;

/// Up to the first NUL: a server's configuration file. Then lines `NAME=VALUE`: variables `STRAND_SERVER_NAME`.
///
/// What is accepted is within the bounds that the server relies on.
pub fn server(data: &[u8]) {
    let (file, variables) = halves(data);
    let variables = String::from_utf8_lossy(variables);
    let variables: Vec<(OsString, OsString)> = variables
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("STRAND_SERVER_{name}").into(), value.into()))
        .collect();
    let path = scratch::file("strand-server.toml", file);
    let read = within(CONFIGURATION_BYTES, || Config::load_with(&path, variables.clone()).ok());
    let Some(config) = read else { return };
    assert!((1..=limits::STREAMS_MAX).contains(&config.max_streams));
    assert!(config.window_bytes >= limits::BLOCK_BYTES_MAX as u64);
    assert!(config.receive_bytes >= limits::DATA_FRAME_BYTES_MAX as u64);
    assert!(!config.listen.is_empty() && !config.names.is_empty());
    assert!(config.advertised().len() <= limits::DATA_ADDRESSES_MAX);
}

/// An agent's settings file.
pub fn agent(data: &[u8]) {
    let path = scratch::file("strand.toml", data);
    // What is wrong with it is told; nothing more is promised.
    let _ = within(CONFIGURATION_BYTES, || Settings::load(&path, true).is_ok());
}

/// First line: a path. The other lines: patterns, as given on the command line and as in a file of the source.
///
/// What is compiled decides the same twice, and patterns that all include again exclude nothing.
/// Memory: what the pattern library lets its automata take.
pub fn patterns(data: &[u8]) {
    const PATTERN_BYTES: usize = 64 << 20;
    let (path, rest) = data.iter().position(|&byte| byte == b'\n').map_or((data, &[][..]), |at| {
        let (path, rest) = data.split_at(at);
        (path, rest.get(1..).unwrap_or_default())
    });
    let lines: Vec<String> = String::from_utf8_lossy(rest).lines().map(str::to_owned).collect();
    within(PATTERN_BYTES, || {
        if let Ok(excludes) = Excludes::new(&lines) {
            assert_eq!(excludes.matches(path), excludes.matches(path));
            let only_again = lines.iter().all(|line| line.starts_with('!'));
            assert!(!(only_again && excludes.matches(path)));
        }
        let _ = Excludes::with_insensitive(&[], &lines).map(|excludes| excludes.matches(path));
        let (rules, problems) = Rules::parse(rest);
        assert!(problems.len() <= lines.len() + 1);
        if let Some(rules) = rules {
            for is_directory in [false, true] {
                assert_eq!(rules.decide(path, is_directory), rules.decide(path, is_directory));
            }
        }
    });
}

fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (first, second) = data.split_at(at);
    (first, second.get(1..).unwrap_or_default())
}
