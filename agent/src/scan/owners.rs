//! User and group names, from `/etc/passwd` and `/etc/group`, read once per run.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use strandline_messages::format::tree::Owner;
use strandline_messages::limits;

/// Most names of each kind that are remembered; ids beyond are saved by number alone.
const NAMES_MAX: usize = 65_536;
/// Most bytes of each file that are read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Names by number.
#[derive(Debug, Default)]
pub struct Owners {
    users: HashMap<u32, Vec<u8>>,
    groups: HashMap<u32, Vec<u8>>,
}

impl Owners {
    /// This machine's names. A file that cannot be read gives no names.
    pub fn of_this_machine() -> Self {
        Self { users: names(Path::new("/etc/passwd")), groups: names(Path::new("/etc/group")) }
    }

    /// User and group with their names, empty where unknown.
    pub fn owner(&self, uid: u32, gid: u32) -> Owner {
        let name = |names: &HashMap<u32, Vec<u8>>, id| names.get(&id).cloned().unwrap_or_default();
        Owner { uid, gid, user: name(&self.users, uid), group: name(&self.groups, gid) }
    }
}

fn names(path: &Path) -> HashMap<u32, Vec<u8>> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut text));
    if let Err(error) = read {
        tracing::debug!(path = %path.display(), %error, "no names of users or groups");
    }
    parse(&text)
}

// Both files are lines of `name:password:number:…`; of several names of one number the first counts, as in getpwuid(3).
fn parse(text: &[u8]) -> HashMap<u32, Vec<u8>> {
    let mut names = HashMap::new();
    for line in text.split(|&byte| byte == b'\n') {
        let mut fields = line.split(|&byte| byte == b':');
        let (Some(name), Some(id)) = (fields.next(), fields.nth(1)) else { continue };
        let Some(id) = std::str::from_utf8(id).ok().and_then(|id| id.parse().ok()) else { continue };
        if !name.is_empty() && name.len() <= limits::FILE_NAME_BYTES_MAX && names.len() < NAMES_MAX {
            names.entry(id).or_insert_with(|| name.to_vec());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_of_a_number_counts_and_nonsense_is_skipped() {
        let names = parse(b"root:x:0:0::/root:/bin/sh\ntoor:x:0:0\nbad\n:x:7\nweb:x:33:\nx:y:notanumber\n");
        assert_eq!(names.get(&0).map(Vec::as_slice), Some(&b"root"[..]));
        assert_eq!(names.get(&33).map(Vec::as_slice), Some(&b"web"[..]));
        assert_eq!(names.len(), 2);
    }
}
