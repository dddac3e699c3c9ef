//! The key file: 64 hexadecimal digits in the user's configuration directory, named after the repository.
//!
//! `<configuration directory>/keys/<repository id>.key`, directory mode 700, file mode 600, written atomically, never
//! overwritten.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use strandline_messages::RepositoryId;
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use super::KeyError;

/// Where the key file of `repository` belongs below the configuration directory.
pub fn key_file_path(config_dir: &Path, repository: &RepositoryId) -> PathBuf {
    config_dir.join("keys").join(format!("{repository}.key"))
}

/// Writes a new key file with mode 600 and syncs it. Refuses to overwrite one.
pub fn store_key_file(path: &Path, key: &[u8; 32]) -> Result<(), KeyError> {
    let failed = |path: &Path, source| KeyError::Io { doing: "writing", path: path.to_owned(), source };
    let directory = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| failed(directory, error))?;
    let mut text = Zeroizing::new(HEXLOWER.encode(key));
    text.push('\n');
    let mut file = NamedTempFile::new_in(directory).map_err(|error| failed(directory, error))?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all());
    written.map_err(|error| failed(path, error))?;
    file.persist_noclobber(path).map_err(|error| match error.error.kind() {
        ErrorKind::AlreadyExists => KeyError::KeyFileExists { path: path.to_owned() },
        _ => failed(path, error.error),
    })?;
    File::open(directory).and_then(|handle| handle.sync_all()).map_err(|error| failed(directory, error))
}

/// Reads a key file; `None` if there is none.
pub fn load_key_file(path: &Path) -> Result<Option<Zeroizing<[u8; 32]>>, KeyError> {
    let failed = |source| KeyError::Io { doing: "reading", path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = Zeroizing::new(Vec::with_capacity(128));
    file.take(128).read_to_end(&mut text).map_err(failed)?;
    let malformed = || KeyError::MalformedKeyFile { path: path.to_owned() };
    let digits = text.trim_ascii();
    let bytes = Zeroizing::new(HEXLOWER_PERMISSIVE.decode(digits).map_err(|_| malformed())?);
    let mut key = Zeroizing::new([0; 32]);
    let read: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| malformed())?;
    key.copy_from_slice(read);
    Ok(Some(key))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_file_reads_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = key_file_path(dir.path(), &RepositoryId([0xab; 16]));
        assert!(load_key_file(&path).unwrap().is_none());
        store_key_file(&path, &[9; 32]).unwrap();
        assert_eq!(*load_key_file(&path).unwrap().unwrap(), [9; 32]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(fs::read(&path).unwrap().len(), 65);
    }

    #[test]
    fn a_key_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = key_file_path(dir.path(), &RepositoryId([1; 16]));
        store_key_file(&path, &[9; 32]).unwrap();
        assert!(matches!(store_key_file(&path, &[8; 32]), Err(KeyError::KeyFileExists { .. })));
        assert_eq!(*load_key_file(&path).unwrap().unwrap(), [9; 32]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays behind");
    }

    #[test]
    fn a_malformed_key_file_is_a_wrong_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.key");
        let long = "ab".repeat(33);
        for text in ["", "xyz", "ab", long.as_str(), &"gg".repeat(32), "ab ab"] {
            fs::write(&path, text).unwrap();
            let error = load_key_file(&path).unwrap_err();
            assert!(matches!(error, KeyError::MalformedKeyFile { .. }), "{text:?}");
            assert!(error.is_wrong_key());
        }
    }
}
