//! Health and metrics over HTTP. `/healthz` says that the daemon's loop turns, `/readyz` whether it
//! forwards and all that belongs to it is in place, with flannel's codes and bodies; whoever asks for
//! JSON gets the reasons.

mod connection;

use std::io::{self, ErrorKind::AddrInUse};
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use connection::Bounded;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use crate::board::Board;
use crate::health::Phase;
use crate::metrics;

const JSON: &str = "application/json";

/// How long a port that is in use is waited for, and how often it is tried.
const PORT_PATIENCE: Duration = Duration::from_secs(2);
const PORT_RETRY: Duration = Duration::from_millis(50);

/// Answers from now on, until the runtime ends.
///
/// # Errors
/// The address cannot be listened at.
pub(crate) async fn serve(address: SocketAddr, board: Board) -> anyhow::Result<()> {
    let listener = listen(address).await.map_err(|error| {
        let other = if error.kind() == AddrInUse {
            "another weftd may run here: stop that one, or "
        } else {
            ""
        };
        let what =
            format!("cannot listen at {address}; {other}change --healthz-port or --healthz-ip");
        anyhow::Error::new(error).context(what)
    })?;
    tracing::info!(%address, "answering health checks");
    let router = Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(scrape))
        .layer(map_response(last))
        .with_state(board);
    let listener = Bounded::new(listener);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("health checks are answered no more: {error}");
        }
    });
    Ok(())
}

/// Waits a moment for who has the port and is about to end, as another weftd at a restart.
async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let patience = Instant::now() + PORT_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == AddrInUse && Instant::now() < patience => {
                sleep(PORT_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// A connection is for one answer, so that none is in the way of others.
async fn last(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn alive(State(board): State<Board>, headers: HeaderMap) -> Response {
    let reasons: Vec<String> = board.stands_still().into_iter().collect();
    answer(&headers, "alive", ["flanneld is running", "flanneld is not running"], &reasons)
}

async fn ready(State(board): State<Board>, headers: HeaderMap) -> Response {
    let reasons = match board.phase() {
        Phase::Starting(what) => vec![what],
        Phase::Forwarding { problems, .. } => {
            problems.into_iter().chain(board.stands_still()).collect()
        }
    };
    answer(&headers, "ready", ["flanneld is ready", "flanneld is not ready yet"], &reasons)
}

/// Yes where nothing speaks against it.
fn answer(
    headers: &HeaderMap,
    question: &str,
    [yes, no]: [&'static str; 2],
    reasons: &[String],
) -> Response {
    let (code, body) = if reasons.is_empty() {
        (StatusCode::OK, yes)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, no)
    };
    let asked_for = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    if !asked_for.into_iter().any(|types| types.contains(JSON)) {
        return (code, body).into_response();
    }
    let document = json!({ (question): reasons.is_empty(), "reasons": reasons });
    (code, [(CONTENT_TYPE, JSON)], document.to_string()).into_response()
}

async fn scrape(State(board): State<Board>) -> Response {
    match tokio::task::spawn_blocking(move || metrics::read(&board)).await {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::board::STILL_MAX;
    use crate::health::Health;
    use crate::log::Log;

    /// The codes of `/healthz` and `/readyz`.
    async fn codes(board: &Board) -> [u16; 2] {
        let (state, headers) = (|| State(board.clone()), HeaderMap::new);
        let alive = alive(state(), headers()).await.status();
        [alive, ready(state(), headers()).await.status()].map(|code| code.as_u16())
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stands_still_is_neither_alive_nor_ready() {
        let health = Health::new();
        let board = Board::new(Log::silent(), &health);
        assert_eq!(codes(&board).await, [200, 503]);
        health.forwards(Vec::new(), Vec::new());
        board.turn();
        assert_eq!(codes(&board).await, [200, 200]);
        tokio::time::advance(STILL_MAX + Duration::from_secs(1)).await;
        assert_eq!(codes(&board).await, [503, 503]);
        board.turn();
        assert_eq!(codes(&board).await, [200, 200]);
    }
}
