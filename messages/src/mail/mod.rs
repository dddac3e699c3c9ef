//! Messages that actors send to one another inside a process.
