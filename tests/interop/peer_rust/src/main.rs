//! The other end of the interoperability tests in Rust: the crate that shims and agents in Rust are written with.
//!
//!     peer serve SOCKET   serve until standard input ends
//!     peer call SOCKET    call a server of the tests, and say what came back, one "call: code result" per line
//!
//! Messages are bytes here and there: what is in them is the business of the tests with Go.

use std::{collections::HashMap, io::Read, sync::Arc, time::Duration};

use async_trait::async_trait;
use ttrpc::r#async::{
    Client, MethodHandler, Server, Service, StreamHandler, StreamInner, TtrpcContext,
};
use ttrpc::{get_status, Code, Error, Request, Response, Result};

const CALLS: &str = "interop.Calls";
const STREAMS: &str = "interop.Streams";

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let address = format!("unix://{}", words[2]);
    match words[1].as_str() {
        "serve" => runtime.block_on(serve(&address)),
        "call" => runtime.block_on(call(&address)),
        other => panic!("serve or call, not {other}"),
    }
}

// The server.

async fn serve(address: &str) {
    let mut methods: HashMap<String, Box<dyn MethodHandler + Send + Sync>> = HashMap::new();
    for name in ["Upper", "Missing", "Slow", "Metadata"] {
        methods.insert(name.into(), Box::new(Method(name)));
    }
    let mut streams: HashMap<String, Arc<dyn StreamHandler + Send + Sync>> = HashMap::new();
    for name in ["Echo", "Concat", "Count"] {
        streams.insert(name.into(), Arc::new(Stream(name)));
    }
    let services = HashMap::from([
        (
            CALLS.to_string(),
            Service {
                methods,
                streams: HashMap::new(),
            },
        ),
        (
            STREAMS.to_string(),
            Service {
                methods: HashMap::new(),
                streams,
            },
        ),
    ]);
    let mut server = Server::new()
        .bind(address)
        .unwrap()
        .register_service(services);
    server.start().await.unwrap();
    println!("ready");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    std::future::pending::<()>().await;
}

fn reply(payload: Vec<u8>) -> Response {
    let mut response = Response::new();
    response.set_status(get_status(Code::OK, ""));
    response.payload = payload;
    response
}

fn failure(code: Code, why: &str) -> Response {
    let mut response = Response::new();
    response.set_status(get_status(code, why));
    response
}

struct Method(&'static str);

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, context: TtrpcContext, request: Request) -> Result<Response> {
        Ok(match self.0 {
            "Upper" => reply(request.payload.to_ascii_uppercase()),
            "Slow" => {
                tokio::time::sleep(Duration::from_millis(200)).await; // later than anybody waits
                reply(vec![])
            }
            "Metadata" => reply(context.metadata["key"].join(",").into_bytes()),
            _ => failure(Code::NOT_FOUND, "no such thing"),
        })
    }
}

struct Stream(&'static str);

#[async_trait]
impl StreamHandler for Stream {
    async fn handler(&self, _: TtrpcContext, mut stream: StreamInner) -> Result<Option<Response>> {
        let mut all = Vec::new();
        loop {
            match stream.recv().await {
                Ok(message) if message == b"fail" => {
                    return Ok(Some(failure(Code::FAILED_PRECONDITION, "as asked")));
                }
                Ok(message) if self.0 == "Echo" => stream.send(message).await?,
                Ok(message) if self.0 == "Count" => {
                    for byte in message {
                        stream.send(vec![byte]).await?;
                    }
                    return Ok(None);
                }
                Ok(message) => all.extend(message),
                Err(Error::Eof) => break,
                Err(error) => return Err(error),
            }
        }
        Ok((self.0 == "Concat").then(|| reply(all)))
    }
}

// The client.

fn request(service: &str, method: &str, payload: &[u8]) -> Request {
    let mut request = Request::new();
    request.service = service.into();
    request.method = method.into();
    request.payload = payload.into();
    request.set_metadata(ttrpc::context::to_pb(HashMap::from([(
        "key".into(),
        vec!["1".into(), "2".into()],
    )])));
    request
}

fn say(call: &str, result: Result<Vec<u8>>) {
    match result {
        Ok(data) => println!("{call}: 0 {}", String::from_utf8_lossy(&data)),
        Err(Error::RpcStatus(status)) => {
            println!("{call}: {} {}", status.code() as i32, status.message())
        }
        Err(error) => println!("{call}: -1 {error}"),
    }
}

async fn call(address: &str) {
    let client = Client::connect(address).await.unwrap();
    for (method, payload) in [
        ("upper", "hello"),
        ("missing", ""),
        ("bug", ""),
        ("none", ""),
        ("metadata", ""),
    ] {
        let answer = client
            .request(request(CALLS, method, payload.as_bytes()))
            .await;
        say(method, answer.map(|response| response.payload));
    }
    let big = client
        .request(request(CALLS, "upper", &vec![b'x'; 3 << 20]))
        .await;
    say(
        "big",
        big.map(|response| response.payload.len().to_string().into_bytes()),
    );
    let mut hurried = request(CALLS, "gate", b"");
    hurried.timeout_nano = 50_000_000;
    let late = client.request(hurried).await;
    println!(
        "late: {}",
        if late.is_err() { "in time" } else { "answered" }
    );
    say("echo", echo(&client).await);
    say("fails", fails(&client).await);
    say("concat", concat(&client).await);
    say("count", count(&client).await);
}

async fn echo(client: &Client) -> Result<Vec<u8>> {
    let mut stream = client
        .new_stream(request(STREAMS, "Echo", b""), true, true)
        .await?;
    let mut total = 0;
    for size in 0..200 {
        stream.send(vec![b'x'; size]).await?;
        total += stream.recv().await?.len();
    }
    stream.close_send().await?;
    match stream.recv().await {
        Err(Error::Eof) => Ok(total.to_string().into_bytes()),
        other => Err(Error::Others(format!("the end of the stream is {other:?}"))),
    }
}

async fn fails(client: &Client) -> Result<Vec<u8>> {
    let mut stream = client
        .new_stream(request(STREAMS, "Echo", b""), true, true)
        .await?;
    stream.send(b"fail".to_vec()).await?;
    stream.recv().await
}

async fn concat(client: &Client) -> Result<Vec<u8>> {
    let mut stream = client
        .new_stream(request(STREAMS, "Concat", b""), true, false)
        .await?;
    for part in ["one ", "two ", "", "three"] {
        stream.send(part.into()).await?;
    }
    stream.close_send().await?;
    stream.recv().await
}

async fn count(client: &Client) -> Result<Vec<u8>> {
    let mut stream = client
        .new_stream(request(STREAMS, "Count", b"abc"), false, true)
        .await?;
    let mut all = Vec::new();
    loop {
        match stream.recv().await {
            Ok(message) => all.extend(message),
            Err(Error::Eof) => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}
