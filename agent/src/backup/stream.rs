//! One file whose content comes through a pipe: standard input, or what a command says.
//!
//! It is cut and hashed as it comes, like any other file; nothing is kept on disk. It can be read once: a second pass over
//! the source is refused. Whatever goes wrong with the pipe ends the backup, because nobody can tell how much is missing.

use std::fmt;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;
use strandline_messages::format::tree::Timestamp;
use strandline_messages::limits;

use super::BackupError;
use super::feed::Job;
use super::items::{Node, NodeContent, Ordered, Place, Step};
use crate::scan::dir::{Dir, DirPool};
use crate::scan::meta::Meta;

/// Types and permissions (`st_mode`): nobody else's business unless its owner says so.
const FILE_MODE: u32 = 0o100_600;
const DIRECTORY_MODE: u32 = 0o040_755;

/// Where the bytes come from.
pub struct Pipe {
    /// The bytes. Reading must fail if the content is not complete.
    pub content: Box<dyn Read + Send>,
    /// Makes a reader that waits fail soon.
    pub stop: Arc<AtomicBool>,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pipe(…)")
    }
}

/// The file and its content.
#[derive(Clone, Debug)]
pub struct StreamSource {
    names: Vec<Vec<u8>>,
    meta: Meta,
    stop: Arc<AtomicBool>,
    pipe: Arc<Mutex<Option<Pipe>>>,
}

impl StreamSource {
    /// A file at `path`, whose directories are made up; its time is `mtime`, its owner whoever runs this. `None`: the path
    /// does not name a file.
    pub fn new(path: &[u8], mtime: Timestamp, pipe: Pipe) -> Option<Self> {
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        let names: Vec<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
        let legal = |name: &Vec<u8>| name != b".." && name.len() <= limits::FILE_NAME_BYTES_MAX && !name.contains(&0);
        let meta = Meta {
            mode: FILE_MODE,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mtime,
            ctime: mtime,
            links: 1,
            ..Meta::default()
        };
        let ok = !names.is_empty() && names.iter().all(legal) && !path.ends_with(b"/");
        ok.then(|| Self { names, meta, stop: Arc::clone(&pipe.stop), pipe: Arc::new(Mutex::new(Some(pipe))) })
    }

    /// What makes a reader that waits for the pipe fail soon.
    pub fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Hands the file to a reader, and its place in the order to the assembler.
    pub(super) fn feed(&self, jobs: &Sender<Job>, ordered: &Sender<Ordered>) -> Result<(), BackupError> {
        let again = "the server misses data of an earlier pass, and this content cannot be read a second time";
        let pipe = self.pipe.lock().take().ok_or_else(|| BackupError::Stream(again.into()))?;
        let machine = |error: rustix::io::Errno| BackupError::Machine { what: "opening `/`", source: error.into() };
        let (root, _) = Dir::root(&DirPool::new(8)).map_err(machine)?;
        let node = |name: &[u8], meta: Meta, content: NodeContent| {
            Box::new(Node {
                name: name.into(),
                meta,
                xattrs: Vec::new(),
                holes: Vec::new(),
                content,
                cacheable: false,
                unchanged: false,
                problems: Vec::new(),
                place: Place { parent: Arc::clone(&root), dir: None },
            })
        };
        let Some((name, directories)) = self.names.split_last() else { return Ok(()) };
        let above = Meta { mode: DIRECTORY_MODE, ..self.meta };
        let mut steps: Vec<Step> =
            directories.iter().map(|name| Step::Enter(node(name, above, NodeContent::None))).collect();
        steps.push(Step::Node(node(name, self.meta, NodeContent::Pipe(pipe))));
        steps.extend(directories.iter().map(|_| Step::Leave));
        let (sender, parts) = bounded(1);
        jobs.send((steps, sender)).map_err(|_| BackupError::Stopped)?;
        ordered.send(Ordered::Parts(parts)).map_err(|_| BackupError::Stopped)
    }
}
