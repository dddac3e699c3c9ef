//! The server's configuration: `DATA/strand-server.toml`, overridden by `STRAND_SERVER_…` variables.
//!
//! A variable's name is the key in capitals, with `__` between a table and its key: `STRAND_SERVER_MAX_STREAMS`,
//! `STRAND_SERVER_GROUP_COMMIT__WAIT`. Lists are separated by commas. Unknown keys are errors, in the file and in the
//! environment.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Environment, File, FileFormat};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use strandline_messages::identity::{DEFAULT_PORT, ServerAddress};
use strandline_messages::limits;

use crate::pki::files;

/// The configuration file's name inside the data directory.
pub const CONFIG_NAME: &str = "strand-server.toml";
/// Beginning of the variables that override the file.
pub const ENVIRONMENT_PREFIX: &str = "STRAND_SERVER";
/// Variables with that prefix that belong to the command line.
const COMMAND_LINE_VARIABLES: [&str; 2] = ["STRAND_SERVER_DATA", "STRAND_SERVER_CONFIG"];
/// Names by which a server is reached on its own machine.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there.
    #[error("there is no configuration {}: run `strand-server init` first", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file or a variable cannot be understood.
    #[error("the configuration {} (with the {ENVIRONMENT_PREFIX}_… variables) cannot be used: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: config::ConfigError,
    },
    /// A value is out of bounds.
    #[error("configuration: `{key}` {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong, as the end of a sentence that begins with the key.
        why: String,
    },
    /// The file is there already.
    #[error("{} exists already: nothing was changed", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// How the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What the server is told. Every key has a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// Addresses told to agents, in order of preference. Empty: the names below with the first listening port.
    pub advertise: Vec<ServerAddress>,
    /// Host names and IP addresses in the server's certificate.
    pub names: Vec<String>,
    /// Most data streams of one session.
    pub max_streams: u16,
    /// Most unacknowledged bytes of one session.
    pub window_bytes: u64,
    /// Most bytes of received blocks, of all sessions together, that wait in memory to become durable.
    pub receive_bytes: u64,
    /// How long a session waits for its agent to come back.
    #[serde(with = "humantime_serde")]
    pub session_grace: Duration,
    /// A connection that makes no progress for this long is closed.
    #[serde(with = "humantime_serde")]
    pub progress_timeout: Duration,
    /// The log.
    pub log: Log,
    /// Certificates.
    pub certificates: Certificates,
    /// What anybody may take of the server.
    pub limits: Limits,
}

/// The log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `text` or `json`.
    pub format: LogFormat,
    /// What is logged, in the words of `tracing`: a level, or levels by module.
    pub filter: String,
}

/// Certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Certificates {
    /// How long an agent's certificate lasts.
    #[serde(with = "humantime_serde")]
    pub agent_validity: Duration,
}

/// What anybody may take of the server, so that enough is left for others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most connections in all. Three quarters of the descriptors that the system allows, if that is less.
    pub connections: usize,
    /// Most connections from one IPv4 address, or from one IPv6 network of 64 bits.
    pub connections_per_address: usize,
    /// Most connections of one agent.
    pub connections_per_agent: usize,
    /// Most sessions of one agent: when it opens more, its oldest one that nobody is connected to ends.
    pub sessions_per_agent: usize,
    /// Most handshakes at once: when more come, the oldest one of the busiest address gives way.
    pub handshakes: usize,
    /// How long a handshake may take, and an enrolment after it.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_address: 4096,
            connections_per_agent: 512,
            sessions_per_agent: 64,
            handshakes: 1024,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([0u16; 8], DEFAULT_PORT))],
            advertise: Vec::new(),
            names: LOCAL_NAMES.map(str::to_owned).to_vec(),
            max_streams: 16,
            window_bytes: 64 << 20,
            receive_bytes: 48 << 20,
            session_grace: Duration::from_mins(10),
            progress_timeout: Duration::from_mins(1),
            log: Log::default(),
            certificates: Certificates::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self { agent_validity: Duration::from_hours(24 * 365) }
    }
}

impl Config {
    /// Reads `path` and lets the variables of this process override it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_with(path, std::env::vars_os())
    }

    /// Reads `path` and lets `variables` override it.
    pub fn load_with(
        path: &Path,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        if !path.exists() {
            return Err(ConfigError::Missing { path: path.to_owned() });
        }
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        let environment = Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator("_")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .with_list_parse_key("listen")
            .with_list_parse_key("advertise")
            .with_list_parse_key("names")
            .source(Some(overrides(variables)));
        let config: Self = config::Config::builder()
            .add_source(File::from(path).format(FileFormat::Toml))
            .add_source(environment)
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(unreadable)?;
        config.check()?;
        Ok(config)
    }

    /// Where agents reach this server: `advertise`, or else its names with the first listening port.
    pub fn advertised(&self) -> Vec<ServerAddress> {
        if !self.advertise.is_empty() {
            return self.advertise.clone();
        }
        let port = self.listen.first().map_or(DEFAULT_PORT, SocketAddr::port);
        let address = |name: &String| -> Option<ServerAddress> {
            let host = if name.contains(':') { format!("[{name}]") } else { name.clone() };
            format!("{host}:{port}").parse().ok()
        };
        let distant = self.names.iter().filter(|name| !LOCAL_NAMES.contains(&name.as_str()));
        let mut addresses: Vec<_> = distant.filter_map(address).take(limits::DATA_ADDRESSES_MAX).collect();
        if addresses.is_empty() {
            addresses = self.names.iter().filter_map(address).take(1).collect();
        }
        addresses
    }

    fn check(&self) -> Result<(), ConfigError> {
        let block = limits::BLOCK_BYTES_MAX as u64;
        check("listen", !self.listen.is_empty(), || "must name at least one address".into())?;
        check("listen", self.listen.len() <= 16, || "names more than 16 addresses".into())?;
        check("names", !self.names.is_empty(), || "must hold at least one host name or IP address".into())?;
        check("names", self.names.len() <= 64, || "holds more than 64 names".into())?;
        for name in &self.names {
            let legal = ServerName::try_from(name.as_str()).is_ok();
            check("names", legal, || format!("holds `{name}`, which is neither a host name nor an IP address"))?;
        }
        check("advertise", self.advertise.len() <= limits::DATA_ADDRESSES_MAX, || {
            format!("holds more than {} addresses", limits::DATA_ADDRESSES_MAX)
        })?;
        check("max_streams", (1..=limits::STREAMS_MAX).contains(&self.max_streams), || {
            format!("must be from 1 to {}", limits::STREAMS_MAX)
        })?;
        check("window_bytes", (block..=1 << 32).contains(&self.window_bytes), || {
            format!("must be from {block} (one block) to {}", 1u64 << 32)
        })?;
        // Less than the longest frame would never be enough for one, and its connection would wait for ever.
        let frame = limits::DATA_FRAME_BYTES_MAX as u64;
        check("receive_bytes", (frame..=1 << 40).contains(&self.receive_bytes), || {
            format!("must be from {frame} (one block) to {}", 1u64 << 40)
        })?;
        let day = Duration::from_hours(24);
        check("session_grace", (Duration::from_secs(10)..=day).contains(&self.session_grace), || {
            "must be from 10s to 1day".into()
        })?;
        // Agents say something at least every 15 s: a shorter limit would take the idle for dead.
        check("progress_timeout", (Duration::from_secs(30)..=day).contains(&self.progress_timeout), || {
            "must be from 30s to 1day".into()
        })?;
        check("certificates.agent_validity", self.certificates.agent_validity >= Duration::from_hours(1), || {
            "must be at least 1h".into()
        })?;
        self.check_limits()
    }

    fn check_limits(&self) -> Result<(), ConfigError> {
        let limits = &self.limits;
        let least = usize::from(self.max_streams) + 1;
        let session = || format!("must be at least {least}: one session has as many connections");
        check("limits.connections", limits.connections >= least, session)?;
        check("limits.connections_per_address", limits.connections_per_address >= least, session)?;
        check("limits.connections_per_agent", limits.connections_per_agent >= least, session)?;
        check("limits.sessions_per_agent", limits.sessions_per_agent >= 1, || "must be at least 1".into())?;
        check("limits.handshakes", limits.handshakes >= 16, || "must be at least 16".into())?;
        let (least, most) = (Duration::from_secs(1), Duration::from_mins(1));
        check("limits.handshake_timeout", (least..=most).contains(&limits.handshake_timeout), || {
            "must be from 1s to 1min".into()
        })
    }
}

fn check(key: &'static str, holds: bool, why: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::Value { key, why: why() }) }
}

fn overrides(variables: impl IntoIterator<Item = (OsString, OsString)>) -> HashMap<String, String> {
    let prefix = format!("{ENVIRONMENT_PREFIX}_");
    variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with(&prefix) && !COMMAND_LINE_VARIABLES.contains(&name.as_str()))
        .collect()
}

/// Writes a configuration with comments to `path`, which must not exist. `names` get the local names added.
pub fn write_initial(
    path: &Path,
    names: &[String],
    listen: &[SocketAddr],
    advertise: &[ServerAddress],
) -> Result<Config, ConfigError> {
    let mut config = Config { advertise: advertise.to_vec(), ..Config::default() };
    if !listen.is_empty() {
        config.listen = listen.to_vec();
    }
    let local = LOCAL_NAMES.iter().map(|name| (*name).to_owned());
    config.names = names.iter().cloned().chain(local.filter(|name| !names.contains(name))).collect();
    config.check()?;
    files::create_private(path, commented(&config).as_bytes()).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::AlreadyExists => ConfigError::Exists { path },
            _ => ConfigError::Write { path, source },
        }
    })?;
    Ok(config)
}

fn commented(config: &Config) -> String {
    let list = |items: Vec<String>| {
        let quoted: Vec<String> = items.iter().map(|item| format!("\"{item}\"")).collect();
        format!("[{}]", quoted.join(", "))
    };
    let time = |duration: Duration| match (duration.as_secs(), duration.subsec_nanos()) {
        (seconds, 0) if seconds > 0 && seconds.is_multiple_of(86_400) => format!("\"{}days\"", seconds / 86_400),
        _ => format!("\"{}\"", humantime::format_duration(duration)),
    };
    let strings = |items: &[ServerAddress]| list(items.iter().map(ToString::to_string).collect());
    let listen = list(config.listen.iter().map(ToString::to_string).collect());
    let mut text = String::new();
    text.push_str(
        "# Strandline server. Every key may be overridden by a variable, for example STRAND_SERVER_MAX_STREAMS=4\n",
    );
    text.push_str("# or STRAND_SERVER_LOG__FORMAT=json. SIGHUP makes the server read this file again.\n\n");
    let mut put = |comment: &str, key: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# {comment}\n{key} = {value}\n");
    };
    put("Where to listen.", "listen", listen);
    put(
        "Where agents find this server, in order of preference. Empty: the names below with the port above.",
        "advertise",
        strings(&config.advertise),
    );
    put("Host names and IP addresses in the server's certificate.", "names", list(config.names.clone()));
    put("Most data streams of one session.", "max_streams", config.max_streams.to_string());
    put("Most unacknowledged bytes of one session.", "window_bytes", config.window_bytes.to_string());
    put("How long a session waits for its agent to come back.", "session_grace", time(config.session_grace));
    put("A connection without progress for this long is closed.", "progress_timeout", time(config.progress_timeout));
    put(
        "text or json; a level or levels by module.",
        "[log]\nformat",
        format!("\"text\"\nfilter = \"{}\"", config.log.filter),
    );
    put(
        "How long an agent's certificate lasts.",
        "[certificates]\nagent_validity",
        time(config.certificates.agent_validity),
    );
    let limits = &config.limits;
    put("Most connections in all.", "[limits]\nconnections", limits.connections.to_string());
    put(
        "Most connections from one IPv4 address, or from one IPv6 network of 64 bits.",
        "connections_per_address",
        limits.connections_per_address.to_string(),
    );
    put("Most connections of one agent.", "connections_per_agent", limits.connections_per_agent.to_string());
    put(
        "Most sessions of one agent: when it opens more, its oldest one that nobody is connected to ends.",
        "sessions_per_agent",
        limits.sessions_per_agent.to_string(),
    );
    put(
        "Most handshakes at once: when more come, the oldest one of the busiest address gives way.",
        "handshakes",
        limits.handshakes.to_string(),
    );
    put(
        "How long a handshake may take, and an enrolment after it.",
        "handshake_timeout",
        time(limits.handshake_timeout),
    );
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(CONFIG_NAME);
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let (_directory, path) = file(text);
        Config::load_with(&path, variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn an_empty_file_means_the_defaults_and_none_says_what_to_do() {
        assert_eq!(load("", &[]).unwrap(), Config::default());
        let missing = Config::load_with(Path::new("/nonexistent/x.toml"), []).unwrap_err().to_string();
        assert!(missing.contains("strand-server init"), "{missing}");
    }

    #[test]
    fn what_init_writes_reads_back_and_is_written_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(CONFIG_NAME);
        let listen = ["[::]:1234".parse().unwrap(), "10.0.0.1:5".parse().unwrap()];
        let advertise = ["[2001:db8::1]:443".parse().unwrap()];
        let written = write_initial(&path, &["backup.example.com".to_owned()], &listen, &advertise).unwrap();
        assert_eq!(Config::load_with(&path, []).unwrap(), written);
        assert_eq!(written.names, ["backup.example.com", "localhost", "127.0.0.1", "::1"]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().filter(|line| line.starts_with('#')).count() > 10, "{text}");
        let again = write_initial(&path, &[], &[], &[]).unwrap_err();
        assert!(matches!(again, ConfigError::Exists { .. }));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        for text in ["max_stream = 3", "[log]\nformt = 3", "[logs]"] {
            let error = load(text, &[]).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{error}");
        }
        let error = load("", &[("STRAND_SERVER_MAX_STREAM", "3")]).unwrap_err().to_string();
        assert!(error.contains("max_stream"), "{error}");
    }

    #[test]
    fn variables_override_the_file() {
        let config = load(
            "max_streams = 3\nsession_grace = \"1m\"",
            &[
                ("STRAND_SERVER_MAX_STREAMS", "5"),
                ("STRAND_SERVER_LOG__FORMAT", "json"),
                ("STRAND_SERVER_NAMES", "a.example,b.example"),
                ("STRAND_SERVER_LISTEN", "127.0.0.1:7"),
                ("STRAND_SERVER_ADVERTISE", "c.example:8"),
                ("STRAND_SERVER_DATA", "/x"),
                ("STRAND_SERVERX", "y"),
                ("PATH", "z"),
            ],
        )
        .unwrap();
        assert_eq!(config.max_streams, 5);
        assert_eq!(config.session_grace, Duration::from_mins(1));
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.names, ["a.example", "b.example"]);
        assert_eq!(config.listen, ["127.0.0.1:7".parse().unwrap()]);
        assert_eq!(config.advertised(), ["c.example:8".parse().unwrap()]);
    }

    #[test]
    fn values_out_of_bounds_are_refused_with_their_key() {
        for (text, key) in [
            ("max_streams = 0", "max_streams"),
            ("max_streams = 65", "max_streams"),
            ("window_bytes = 1000", "window_bytes"),
            ("receive_bytes = 1000", "receive_bytes"),
            ("listen = []", "listen"),
            ("names = []", "names"),
            ("names = [\"a b\"]", "names"),
            ("session_grace = \"1s\"", "session_grace"),
        ] {
            let error = load(text, &[]).unwrap_err();
            assert!(matches!(&error, ConfigError::Value { key: found, .. } if *found == key), "{text}: {error}");
        }
        assert!(load("listen = [\"nonsense\"]", &[]).is_err());
        assert!(load("advertise = [\"a:b:c\"]", &[]).is_err());
        assert!(load("max_streams = [", &[]).is_err());
    }

    #[test]
    fn what_is_advertised_comes_from_the_names_unless_it_is_said() {
        let mut config = load("names = [\"x.example\", \"localhost\", \"2001:db8::1\"]", &[]).unwrap();
        let texts = |config: &Config| config.advertised().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&config), ["x.example:9847", "[2001:db8::1]:9847"]);
        config.names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        assert_eq!(texts(&config), ["localhost:9847"]);
    }
}
