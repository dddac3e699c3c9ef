//! Where this user's keys, identities and caches are, and the settings file.

use std::path::{Path, PathBuf};

use config::{Environment, File, FileFormat};
use serde::Deserialize;

use super::args::Global;

/// The settings file's name in the configuration directory.
const SETTINGS_NAME: &str = "strand.toml";

/// Defaults of the command line, from `strand.toml`. A value on the command line or in a variable wins.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// As `--repository`.
    pub repository: Option<String>,
    /// As `--password-file`.
    pub password_file: Option<PathBuf>,
    /// As `--password-command`.
    pub password_command: Option<String>,
    /// As `--key-file`.
    pub key_file: Option<PathBuf>,
    /// As `--host`.
    pub host: Option<String>,
    /// As `--streams`.
    pub streams: Option<u16>,
    /// As `--limit-upload`: bytes per second with an optional unit.
    pub limit_upload: Option<String>,
    /// As `--window`.
    pub window: Option<String>,
    /// As `--compression`.
    pub compression: Option<String>,
    /// As `--exclude`, in addition to those of the command line.
    pub exclude: Vec<String>,
    /// As `--exclude-file`, in addition to those of the command line.
    pub exclude_file: Vec<PathBuf>,
    /// As `--iexclude`, in addition to those of the command line.
    pub iexclude: Vec<String>,
    /// As `--iexclude-file`, in addition to those of the command line.
    pub iexclude_file: Vec<PathBuf>,
    /// As `--exclude-if-present`, in addition to those of the command line.
    pub exclude_if_present: Vec<String>,
    /// As `--exclude-caches`.
    pub exclude_caches: bool,
    /// As `--exclude-larger-than`.
    pub exclude_larger_than: Option<String>,
    /// As `--exclude-per-directory`.
    pub exclude_per_directory: Option<String>,
    /// As `--one-file-system`.
    pub one_file_system: bool,
    /// As `--ignore-inode`.
    pub ignore_inode: bool,
    /// As `--ignore-ctime`.
    pub ignore_ctime: bool,
}

impl Settings {
    /// Reads `path` and lets the variables `STRAND_SETTING_…` of this process override it. A file that is not there is an
    /// error only if it is `required`.
    pub fn load(path: &Path, required: bool) -> anyhow::Result<Self> {
        config::Config::builder()
            .add_source(File::from(path).format(FileFormat::Toml).required(required))
            .add_source(
                Environment::with_prefix("STRAND_SETTING").prefix_separator("_").separator("__").try_parsing(true),
            )
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| anyhow::anyhow!("the settings {} cannot be used: {error}", path.display()))
    }
}

/// Everything that does not depend on the command.
#[derive(Clone, Debug)]
pub struct Place {
    /// Keys and identities.
    pub config_dir: PathBuf,
    /// Caches and temporary files.
    pub state_dir: PathBuf,
    /// The settings file.
    pub settings: Settings,
}

impl Place {
    /// From the command line, the environment and the settings file. Makes no directory.
    pub fn find(global: &Global) -> anyhow::Result<Self> {
        let config_dir = match &global.config_dir {
            Some(dir) => dir.clone(),
            None => base("XDG_CONFIG_HOME", ".config")?.join("strandline"),
        };
        let state_dir = match &global.state_dir {
            Some(dir) => dir.clone(),
            None => base("XDG_CACHE_HOME", ".cache")?.join("strandline"),
        };
        let settings = match &global.config {
            Some(path) => Settings::load(path, true)?,
            None => Settings::load(&config_dir.join(SETTINGS_NAME), false)?,
        };
        Ok(Self { config_dir, state_dir, settings })
    }
}

fn base(variable: &str, below_home: &str) -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set(variable).or_else(|| set("HOME").map(|home| home.join(below_home))).ok_or_else(|| {
        anyhow::anyhow!("neither {variable} nor HOME is set: say where with --config-dir and --state-dir")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_setting_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SETTINGS_NAME);
        std::fs::write(&path, "streams = 3\nlimit_upload = \"10M\"\n").unwrap();
        assert_eq!(Settings::load(&path, true).unwrap().streams, Some(3));
        std::fs::write(&path, "straems = 3\n").unwrap();
        assert!(Settings::load(&path, true).unwrap_err().to_string().contains("straems"));
        assert!(Settings::load(&dir.path().join("none"), false).unwrap().repository.is_none());
        assert!(Settings::load(&dir.path().join("none"), true).is_err());
    }
}
