//! What the kernel takes for a word to many, without a server. In: bursts a second and seconds. Out: CPU microseconds of one `send`
//! of 300 bytes to each of 350 TCP connections on loopback, the receiving half of which the sender's core does, too.
//!
//! `cargo bench --bench floor -- RATE SECONDS`; the sender has core 0, the receiver core 1. `bench/measure --only room` puts it
//! beside a chat room.

use std::io::Read;
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nitro::rt::thread_cpu_us;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::SendFlags;

const RECEIVERS: usize = 350;
const BYTES: usize = 300;

fn pin(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    // on a machine with one core both share it
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

fn receive(mut sockets: Vec<TcpStream>) {
    pin(1);
    let set = epoll::create(CreateFlags::CLOEXEC).expect("epoll");
    for (n, socket) in sockets.iter().enumerate() {
        socket.set_nonblocking(true).expect("nonblocking");
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&set, socket, EventData::new_u64(n as u64), flags).expect("epoll");
    }
    let mut bytes = [0; 8192];
    loop {
        let mut ready = [const { MaybeUninit::uninit() }; 256];
        let (ready, _) = epoll::wait(&set, &mut ready[..], None).expect("epoll");
        for event in ready {
            let data = event.data;
            let _ = sockets[data.u64() as usize].read(&mut bytes);
        }
    }
}

fn main() {
    // cargo adds a word of its own
    let mut numbers = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse::<f64>().ok());
    let rate = numbers.next().unwrap_or(100.0);
    let seconds = numbers.next().unwrap_or(1.0);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut receivers = Vec::new();
    let senders: Vec<TcpStream> = (0..RECEIVERS)
        .map(|_| {
            receivers.push(TcpStream::connect(address).expect("a connection"));
            let (sender, _) = listener.accept().expect("a connection");
            sender.set_nodelay(true).expect("nodelay");
            sender
        })
        .collect();
    std::thread::spawn(move || receive(receivers));
    pin(0);
    let message = [b'x'; BYTES];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let began = Instant::now();
    let (before, mut bursts) = (thread_cpu_us(), 0);
    while began.elapsed().as_secs_f64() < seconds {
        for socket in &senders {
            assert_eq!(rustix::net::send(socket, &message, flags), Ok(BYTES));
        }
        bursts += 1;
        let due = Duration::from_secs_f64(f64::from(bursts) / rate);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    let sends = f64::from(bursts) * RECEIVERS as f64;
    println!("{:.3}", (thread_cpu_us() - before) as f64 / sends);
}
