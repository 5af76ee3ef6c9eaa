// Finds the doors of a domain by its host-meta (XEP-0156) with @xmpp/resolve, and logs in with @xmpp/client by the first of them.
//
//   node find.mjs HOST[:PORT] DOMAIN USER PASSWORD
//
// Out: the addresses, best first; ends with status 1 and a word if there are none or the login fails.

import { client } from "@xmpp/client";
import { resolve } from "@xmpp/resolve/lib/http.js";
import WebSocket from "ws";

const [host, domain, username, password] = process.argv.slice(2);
globalThis.WebSocket = WebSocket;
setTimeout(() => fail("too late"), 25_000).unref();

function fail(why) {
  console.error(why);
  process.exit(1);
}

const found = (await resolve(host)).map(({ uri }) => uri);
if (found.length === 0) fail("nothing found");
const xmpp = client({ service: found[0], domain, username, password });
xmpp.on("error", fail);
await xmpp.start();
await xmpp.stop();
console.log(found.join(" "));
