//! State files beside packs: what is freed or withdrawn is written here, and synced, before it takes effect.

use std::fs::{self, File};
use std::io::{self, Write};

use strandline_messages::RepositoryId;
use strandline_messages::format::pack_state::{STATE_HEADER_BYTES, STATE_RECORD_BYTES, StateHeaderV1, StateRecordV1};
use strandline_messages::limits;

use super::layout::RepositoryPaths;
use super::{StorageError, files};
use crate::failpoint;

/// Longest state file that is read, bytes: every block of a full pack freed and withdrawn several times over.
const STATE_BYTES_MAX: usize = STATE_HEADER_BYTES + 4 * limits::PACK_BLOCKS_MAX * STATE_RECORD_BYTES;

/// What the state file of pack `number` says, oldest first; nothing if there is none. A file that is not this pack's says
/// nothing either, which is logged: what it freed then looks damaged, which is safe.
pub fn read(
    paths: &RepositoryPaths,
    repository: RepositoryId,
    number: u32,
) -> Result<Vec<StateRecordV1>, StorageError> {
    let path = paths.pack_state(number);
    let Some(bytes) = files::read_small(&path, STATE_BYTES_MAX)? else { return Ok(Vec::new()) };
    let expected = StateHeaderV1 { number, repository };
    let Some((header, records)) = bytes.split_at_checked(STATE_HEADER_BYTES) else { return Ok(Vec::new()) };
    match StateHeaderV1::decode(header) {
        Ok(header) if header == expected => Ok(header.decode_records(records).collect()),
        _ => {
            tracing::error!(path = %path.display(), "a pack's state file is damaged; the blocks that it names are taken for damaged");
            Ok(Vec::new())
        }
    }
}

/// Appends `records` and syncs them; the file is made if need be.
pub fn append(
    paths: &RepositoryPaths,
    repository: RepositoryId,
    number: u32,
    records: &[StateRecordV1],
) -> Result<(), StorageError> {
    let path = paths.pack_state(number);
    let header = StateHeaderV1 { number, repository };
    let encoded: Vec<u8> = records.iter().flat_map(|record| header.encode_record(record)).collect();
    let length = match fs::metadata(&path) {
        Ok(metadata) => usize::try_from(metadata.len()).unwrap_or(usize::MAX),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(StorageError::io("read", &path)(error)),
    };
    if length < STATE_HEADER_BYTES {
        return files::write_atomically(&path, &[header.encode(), encoded].concat());
    }
    // A crash may have left part of a record: it is filled up, and never counts.
    let torn = (length - STATE_HEADER_BYTES) % STATE_RECORD_BYTES;
    let padding = if torn == 0 { 0 } else { STATE_RECORD_BYTES - torn };
    let write = || -> io::Result<()> {
        let mut file = File::options().append(true).open(&path)?;
        file.write_all(&[vec![0; padding], encoded].concat())?;
        failpoint::reached("pack-state/written");
        failpoint::sync("pack-state/sync", || file.sync_data())
    };
    write().map_err(StorageError::io("write", &path))
}

#[cfg(test)]
mod tests {
    use strandline_messages::format::pack_state::RecordedState;

    use super::*;

    const REPOSITORY: RepositoryId = RepositoryId([3; 16]);

    fn record(offset: u32) -> StateRecordV1 {
        StateRecordV1 { offset, state: RecordedState::Freed, at_ns: 1 }
    }

    #[test]
    fn s27_records_survive_a_tail_torn_at_any_byte() {
        let dir = tempfile::tempdir().unwrap();
        let paths = RepositoryPaths::new(dir.path().to_owned());
        fs::create_dir(paths.packs()).unwrap();
        assert!(read(&paths, REPOSITORY, 1).unwrap().is_empty());
        append(&paths, REPOSITORY, 1, &[record(96)]).unwrap();
        append(&paths, REPOSITORY, 1, &[record(200), record(300)]).unwrap();
        let path = paths.pack_state(1);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let kept = read(&paths, REPOSITORY, 1).unwrap();
            append(&paths, REPOSITORY, 1, &[record(400)]).unwrap();
            let expected: Vec<_> = kept.into_iter().chain([record(400)]).collect();
            assert_eq!(read(&paths, REPOSITORY, 1).unwrap(), expected, "cut at {cut}");
        }
        assert!(read(&paths, RepositoryId([4; 16]), 1).unwrap().is_empty());
    }
}
