//! What strangers, neighbours, thieves and broken peers try on a real server, and what they get: nothing.

mod attackers;
mod cuts;
mod fleet;
mod limits;
mod load;
mod matrix;
mod operations;
mod oracle;
mod probes;
mod replay;
mod rollback;
mod slow;
mod versions;
mod victim;
