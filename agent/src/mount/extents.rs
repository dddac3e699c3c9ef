//! From offsets in a file to offsets in its content stream, through the holes.

use strandline_messages::format::tree::Hole;

/// Where a file has data. Holds 24 bytes for each hole and one more.
#[derive(Debug, Clone)]
pub(super) struct Extents {
    size: u64,
    /// Ascending, none empty.
    data: Box<[Data]>,
}

#[derive(Debug, Clone, Copy)]
struct Data {
    file: u64,
    stream: u64,
    bytes: u64,
}

/// A stretch of a file that is either data or hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Where it ends in the file.
    pub(super) end: u64,
    /// Where the asked-for byte is in the content stream; `None` in a hole.
    pub(super) stream: Option<u64>,
}

impl Extents {
    /// `holes` ascend and lie within `size`, as the decoder has checked; whatever they say, nothing here overflows.
    pub(super) fn new(size: u64, holes: &[Hole]) -> Self {
        let (mut file, mut stream) = (0, 0);
        let mut data = Vec::new();
        for (offset, bytes) in holes.iter().map(|hole| (hole.offset, hole.bytes)).chain([(size, 0)]) {
            let offset = offset.min(size);
            if offset > file {
                data.push(Data { file, stream, bytes: offset - file });
                stream += offset - file;
            }
            file = offset.saturating_add(bytes).max(file);
        }
        Self { size, data: data.into() }
    }

    /// Length of the file, bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Length of the content stream, bytes.
    pub(super) fn stream_bytes(&self) -> u64 {
        self.data.last().map_or(0, |last| last.stream + last.bytes)
    }

    /// What is at `offset` of the file; `None` behind its end.
    pub(super) fn at(&self, offset: u64) -> Option<Stretch> {
        if offset >= self.size {
            return None;
        }
        let after = self.data.partition_point(|data| data.file <= offset);
        if let Some(data) = after.checked_sub(1).and_then(|before| self.data.get(before))
            && offset - data.file < data.bytes
        {
            return Some(Stretch { end: data.file + data.bytes, stream: Some(data.stream + (offset - data.file)) });
        }
        Some(Stretch { end: self.data.get(after).map_or(self.size, |data| data.file), stream: None })
    }

    /// The first offset from `offset` on that is data (`SEEK_DATA`); `None` if there is none.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        match self.at(offset)? {
            Stretch { stream: Some(_), .. } => Some(offset),
            Stretch { end, .. } => (end < self.size).then_some(end),
        }
    }

    /// The first offset from `offset` on that is in a hole, the end of the file being one (`SEEK_HOLE`); `None` behind it.
    pub(super) fn next_hole(&self, offset: u64) -> Option<u64> {
        match self.at(offset)? {
            Stretch { stream: None, .. } => Some(offset),
            Stretch { end, .. } => Some(end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_lies_around_the_holes() {
        let hole = |offset, bytes| Hole { offset, bytes };
        let sparse = Extents::new(100, &[hole(0, 10), hole(20, 5), hole(90, 10)]);
        assert_eq!((sparse.size(), sparse.stream_bytes()), (100, 75));
        assert_eq!(sparse.at(0), Some(Stretch { end: 10, stream: None }));
        assert_eq!(sparse.at(12), Some(Stretch { end: 20, stream: Some(2) }));
        assert_eq!(sparse.at(24), Some(Stretch { end: 25, stream: None }));
        assert_eq!(sparse.at(25), Some(Stretch { end: 90, stream: Some(10) }));
        assert_eq!(sparse.at(95), Some(Stretch { end: 100, stream: None }));
        assert_eq!(sparse.at(100), None);
        assert_eq!((sparse.next_data(0), sparse.next_data(21), sparse.next_data(92)), (Some(10), Some(25), None));
        assert_eq!((sparse.next_hole(10), sparse.next_hole(22), sparse.next_hole(30)), (Some(20), Some(22), Some(90)));
        let plain = Extents::new(7, &[]);
        assert_eq!((plain.next_hole(3), plain.next_data(3), plain.next_hole(7)), (Some(7), Some(3), None));
        assert_eq!(Extents::new(0, &[]).at(0), None);
    }

    #[test]
    fn holes_that_contradict_the_size_are_cut() {
        let wild = Extents::new(10, &[Hole { offset: 5, bytes: u64::MAX }, Hole { offset: 3, bytes: 9 }]);
        assert_eq!(wild.stream_bytes(), 5);
        assert_eq!(wild.at(9), Some(Stretch { end: 10, stream: None }));
    }
}
