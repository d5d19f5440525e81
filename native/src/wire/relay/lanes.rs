//! The connections to the server behind, each with as many calls at a time as gRPC servers are used to.

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

const CALLS_PER_LANE: usize = 100; // what gRPC servers are used to
const WINDOW: u32 = 128 << 10; // of a call, towards us
const WINDOW_LANE: u32 = CALLS_PER_LANE as u32 * WINDOW; // so that a call whose caller does not read holds up no other one
const SMALL_FRAMES: usize = 2 * WINDOW_LANE as usize;
const HEADER_NBYTES: u32 = 256 << 10; // of an answer
const CONNECT: Duration = Duration::from_secs(5);
const TRIES: usize = 3; // to find a connection that still takes calls

/// The connections to the server behind.
pub struct Lanes {
    path: PathBuf,
    lanes: Mutex<Vec<Arc<Lane>>>,
    connecting: tokio::sync::Mutex<()>,
}

/// One connection.
struct Lane {
    sender: SendRequest<Bytes>,
    calls: AtomicUsize,
    broken: Arc<AtomicBool>,
}

/// A place on a lane, until the call is over.
pub struct Place(Arc<Lane>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

impl Lanes {
    pub fn new(path: PathBuf) -> Self {
        Lanes {
            path,
            lanes: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// A place on a connection that takes calls; one is made where there is none. None: nobody listens.
    pub async fn place(&self) -> Option<(SendRequest<Bytes>, Place)> {
        for _ in 0..TRIES {
            let place = match self.free() {
                Some(place) => place,
                None => {
                    let _alone = self.connecting.lock().await;
                    match self.free() {
                        Some(place) => place, // somebody else has made it meanwhile
                        None => self.connect().await?,
                    }
                }
            };
            match place.0.sender.clone().ready().await {
                Ok(sender) => return Some((sender, place)),
                Err(_) => place.0.broken.store(true, Relaxed),
            }
        }
        None
    }

    fn free(&self) -> Option<Place> {
        let mut lanes = self.lanes.lock();
        lanes.retain(|lane| !lane.broken.load(Relaxed));
        let free = lanes.iter().find(|lane| {
            lane.calls.load(Relaxed) < lane.sender.current_max_send_streams().min(CALLS_PER_LANE)
        })?;
        free.calls.fetch_add(1, Relaxed);
        Some(Place(free.clone()))
    }

    async fn connect(&self) -> Option<Place> {
        let connected = timeout(CONNECT, async {
            let socket = UnixStream::connect(&self.path).await.ok()?;
            Builder::new()
                .initial_window_size(WINDOW)
                .initial_connection_window_size(WINDOW_LANE)
                .data_frame_budget(SMALL_FRAMES)
                .max_header_list_size(HEADER_NBYTES)
                .enable_push(false)
                .handshake::<_, Bytes>(socket)
                .await
                .ok()
        });
        let (sender, connection) = connected.await.ok().flatten()?;
        let broken = Arc::new(AtomicBool::new(false));
        let lane = Arc::new(Lane {
            sender,
            calls: AtomicUsize::new(1),
            broken: broken.clone(),
        });
        tokio::spawn(async move {
            let _ = connection.await;
            broken.store(true, Relaxed);
        });
        self.lanes.lock().push(lane.clone());
        Some(Place(lane))
    }
}
