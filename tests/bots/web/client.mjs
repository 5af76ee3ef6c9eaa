// A page's client: signs in, writes to a peer, waits for an answer, is cut and comes back, writes again, signs out.
//
//   node client.mjs xmpp.js|strophe URL JID PASSWORD PEER
//
// In: messages of the peer. Out: "first", then "again", to the peer; the exit status says whether all went well in time.

import { JSDOM } from "jsdom";
import WebSocket from "ws";

const [library, url, jid, password, peer] = process.argv.slice(2);
const [username, rest] = jid.split("@");
const [domain, resource] = rest.split("/");
globalThis.WebSocket = WebSocket;
setTimeout(() => fail("too late"), 25_000);

function fail(why) {
  console.error(why);
  process.exit(1);
}

async function xmppJs() {
  const { client, xml } = await import("@xmpp/client");
  const xmpp = client({ service: url, domain, username, password, resource });
  const say = (text) => xmpp.send(xml("message", { to: peer, type: "chat" }, xml("body", {}, text)));
  let online = 0;
  xmpp.on("error", (error) => console.error(error.message));
  const back = async () => {
    online += 1;
    if (online === 1) {
      await xmpp.send(xml("presence"));
      await say("first");
    } else {
      await say("again");
    }
  };
  xmpp.on("online", back);
  xmpp.streamManagement.on("resumed", back);
  xmpp.on("stanza", async (stanza) => {
    const body = stanza.is("message") && stanza.getChildText("body");
    if (body === "answer to first") {
      // as a network would: without a word
      xmpp.socket.socket.terminate();
    } else if (body === "answer to again") {
      await xmpp.stop();
      console.log(`signed in ${online} times`);
      process.exit(0);
    }
  });
  await xmpp.start();
}

async function strophe() {
  const { window } = new JSDOM("", { url: url.replace(/^ws/, "http") });
  Object.assign(globalThis, { window, document: window.document, XMLHttpRequest: window.XMLHttpRequest });
  const { Strophe, $pres, $msg } = await import("strophe.js");
  const say = (connection, text) => connection.send($msg({ to: peer, type: "chat" }).c("body").t(text));
  const signIn = (text, then) => {
    const connection = new Strophe.Connection(url);
    let done = false;
    let over = false;
    connection.connect(jid, password, (status, why) => {
      if (status === Strophe.Status.CONNECTED) {
        connection.addHandler(
          (message) => {
            const body = message.getElementsByTagName("body")[0];
            done = body !== undefined && body.textContent === `answer to ${text}`;
            if (done) connection.disconnect();
            return !done;
          },
          null,
          "message",
        );
        connection.send($pres());
        say(connection, text);
      } else if (status === Strophe.Status.AUTHFAIL || status === Strophe.Status.CONNFAIL) {
        fail(`${why ?? status}`);
      } else if (status === Strophe.Status.DISCONNECTED) {
        if (!done) fail("disconnected");
        // it may say so twice
        if (!over) then();
        over = true;
      }
    });
  };
  signIn("first", () => signIn("again", () => process.exit(0)));
}

await (library === "strophe" ? strophe() : xmppJs());
