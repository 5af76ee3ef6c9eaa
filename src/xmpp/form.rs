//! Data forms (XEP-0004): what the server asks, and what somebody has filled in.
//!
//! In: a [`Form`] with its [`Field`]s, out: the `<x/>` element. In: an `<x/>` element, out: [`Values`], read field by field as the
//! type that the field has. Promises: a form that is read has the type and the FORM_TYPE (XEP-0068) that were asked for, no field
//! twice, no field without a name, and no more of them than [`FIELDS_MAX`]; a value that its type does not know is an error,
//! never a default. A field without a value counts as one that is not there.

use super::error::StanzaError;
use super::jid::Jid;
use crate::xml::dom::Element;

pub const NS: &str = "jabber:x:data";
pub const FORM_TYPE: &str = "FORM_TYPE";

/// More fields than any form has that we know.
pub const FIELDS_MAX: usize = 128;

/// What a form is for (section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks.
    Form,
    /// Answers.
    Submit,
    /// Takes back the asking.
    Cancel,
    /// Tells.
    Result,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Kind::Form => "form",
            Kind::Submit => "submit",
            Kind::Cancel => "cancel",
            Kind::Result => "result",
        }
    }
}

/// A form that is built.
#[derive(Clone, Debug)]
pub struct Form {
    kind: Kind,
    title: Option<String>,
    instructions: Option<String>,
    fields: Vec<Field>,
}

impl Form {
    /// An empty FORM_TYPE: without one.
    pub fn new(kind: Kind, form_type: &str) -> Form {
        let form_type = Some(form_type).filter(|ns| !ns.is_empty());
        Form {
            kind,
            title: None,
            instructions: None,
            fields: form_type
                .map(|ns| Field::hidden(FORM_TYPE, ns))
                .into_iter()
                .collect(),
        }
    }

    pub fn title(mut self, title: impl Into<String>) -> Form {
        self.title = Some(title.into());
        self
    }

    pub fn instructions(mut self, text: impl Into<String>) -> Form {
        self.instructions = Some(text.into());
        self
    }

    pub fn field(mut self, field: Field) -> Form {
        self.fields.push(field);
        self
    }

    pub fn element(&self) -> Element {
        let mut x = Element::new("x", NS).attr("type", self.kind.name());
        let texts = [("title", &self.title), ("instructions", &self.instructions)];
        for (name, text) in texts {
            if let Some(text) = text {
                x = x.child(Element::new(name, NS).text(text.as_str()));
            }
        }
        // the type of a field is for those who are to fill it in (section 3.2)
        let typed = self.kind == Kind::Form;
        self.fields
            .iter()
            .fold(x, |x, field| x.child(field.element(typed)))
    }
}

/// A field of a form that is built (sections 3.2 and 3.3).
#[derive(Clone, Debug)]
pub struct Field {
    typ: &'static str,
    var: String,
    label: Option<String>,
    required: bool,
    values: Vec<String>,
    /// Label, value.
    options: Vec<(String, String)>,
}

impl Field {
    fn new(typ: &'static str, var: &str, values: Vec<String>) -> Field {
        Field {
            typ,
            var: var.to_owned(),
            label: None,
            required: false,
            values,
            options: Vec::new(),
        }
    }

    pub fn boolean(var: &str, value: bool) -> Field {
        Field::new("boolean", var, vec![if value { "1" } else { "0" }.into()])
    }

    /// Text for people, without a name.
    pub fn fixed(text: &str) -> Field {
        Field::new("fixed", "", vec![text.into()])
    }

    pub fn hidden(var: &str, value: &str) -> Field {
        Field::new("hidden", var, vec![value.into()])
    }

    /// An empty text is a field without value, here and below.
    pub fn text(var: &str, value: &str) -> Field {
        Field::new("text-single", var, some(value))
    }

    /// A password: clients do not show what is typed.
    pub fn private(var: &str, value: &str) -> Field {
        Field::new("text-private", var, some(value))
    }

    /// A value for each line.
    pub fn text_multi(var: &str, value: &str) -> Field {
        Field::new(
            "text-multi",
            var,
            value.lines().map(str::to_owned).collect(),
        )
    }

    pub fn jid(var: &str, value: &str) -> Field {
        Field::new("jid-single", var, some(value))
    }

    pub fn jids<S: Into<String>>(var: &str, values: impl IntoIterator<Item = S>) -> Field {
        Field::new("jid-multi", var, all(values))
    }

    /// One of several.
    pub fn list(var: &str, value: &str) -> Field {
        Field::new("list-single", var, some(value))
    }

    /// Any of several.
    pub fn lists<S: Into<String>>(var: &str, values: impl IntoIterator<Item = S>) -> Field {
        Field::new("list-multi", var, all(values))
    }

    pub fn label(mut self, label: impl Into<String>) -> Field {
        self.label = Some(label.into());
        self
    }

    pub fn required(mut self) -> Field {
        self.required = true;
        self
    }

    /// What may be chosen in a list.
    pub fn option(mut self, label: impl Into<String>, value: impl Into<String>) -> Field {
        self.options.push((label.into(), value.into()));
        self
    }

    fn element(&self, typed: bool) -> Element {
        let mut field = Element::new("field", NS);
        if !self.var.is_empty() {
            field.set("var", self.var.as_str());
        }
        if typed || self.var == FORM_TYPE {
            field.set("type", self.typ);
        }
        if let Some(label) = &self.label {
            field.set("label", label.as_str());
        }
        let value = |text: &str| Element::new("value", NS).text(text);
        if self.required {
            field = field.child(Element::new("required", NS));
        }
        for text in &self.values {
            field = field.child(value(text));
        }
        for (label, text) in self.options.iter().filter(|_| typed) {
            let option = Element::new("option", NS).attr("label", label.as_str());
            field = field.child(option.child(value(text)));
        }
        field
    }
}

fn some(value: &str) -> Vec<String> {
    let value = Some(value).filter(|v| !v.is_empty());
    value.map(str::to_owned).into_iter().collect()
}

fn all<S: Into<String>>(values: impl IntoIterator<Item = S>) -> Vec<String> {
    values.into_iter().map(Into::into).collect()
}

/// What somebody has filled in: names of fields and their values, in the order of the form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Values(Vec<(String, Vec<String>)>);

/// A form that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Submitted(Values),
    Cancelled,
}

impl Answer {
    /// Reads the `<x/>`: `<bad-request/>` where it is no answer to a form with this FORM_TYPE. A form may leave FORM_TYPE out, as
    /// old clients do, where there is only one that it could mean.
    pub fn read(x: &Element, form_type: &str) -> Result<Answer, StanzaError> {
        match x.get("type") {
            Some("cancel") => Ok(Answer::Cancelled),
            Some("submit") => Values::read(x, form_type).map(Answer::Submitted),
            _ => Err(StanzaError::BAD_REQUEST.text("a form of type submit or cancel is wanted")),
        }
    }
}

impl Values {
    /// The form among the children of `parent`; `None`: there is none.
    pub fn of(parent: &Element, form_type: &str) -> Result<Option<Values>, StanzaError> {
        match parent.find("x", NS) {
            None => Ok(None),
            Some(x) => match Answer::read(x, form_type)? {
                Answer::Submitted(values) => Ok(Some(values)),
                Answer::Cancelled => Ok(None),
            },
        }
    }

    /// The fields of an `<x/>` of whatever type.
    pub fn read(x: &Element, form_type: &str) -> Result<Values, StanzaError> {
        if !x.is("x", NS) {
            return Err(StanzaError::BAD_REQUEST.text("that is not a form"));
        }
        let mut values = Values::default();
        for field in x.elements().filter(|e| e.is("field", NS)) {
            if field.get("type") == Some("fixed") {
                continue;
            }
            let Some(var) = field.get("var") else {
                return Err(StanzaError::BAD_REQUEST.text("a field of the form has no name"));
            };
            if values.get(var).is_some() {
                return Err(StanzaError::BAD_REQUEST.text("a field of the form is there twice"));
            }
            if values.0.len() == FIELDS_MAX {
                return Err(StanzaError::BAD_REQUEST.text("the form has too many fields"));
            }
            let texts = field.elements().filter(|e| e.is("value", NS));
            values
                .0
                .push((var.to_owned(), texts.map(Element::text_content).collect()));
        }
        match values.one(FORM_TYPE)? {
            Some(given) if given != form_type => {
                Err(StanzaError::BAD_REQUEST.text("the form has another FORM_TYPE"))
            }
            _ => Ok(values),
        }
    }

    /// All values of a field, none or more; `None`: the field is not there.
    pub fn get(&self, var: &str) -> Option<&[String]> {
        let field = self.0.iter().find(|(v, _)| v == var);
        field.map(|(_, values)| &values[..])
    }

    /// Fields and their values, in the form's order, FORM_TYPE among them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.0.iter().map(|(var, values)| (&var[..], &values[..]))
    }

    /// The value of a field that has one at most, whatever it is. An empty one is a value: that is how a text is emptied.
    pub fn one(&self, var: &str) -> Result<Option<&str>, StanzaError> {
        match self.get(var) {
            None | Some([]) => Ok(None),
            Some([value]) => Ok(Some(value)),
            Some(_) => Err(StanzaError::BAD_REQUEST.text("a field of the form has several values")),
        }
    }

    /// `xs:boolean`.
    pub fn boolean(&self, var: &str) -> Result<Option<bool>, StanzaError> {
        self.one(var)?
            .filter(|text| !text.is_empty())
            .map(|text| match text {
                "1" | "true" => Ok(true),
                "0" | "false" => Ok(false),
                _ => Err(StanzaError::NOT_ACCEPTABLE.text("a field of the form is no boolean")),
            })
            .transpose()
    }

    /// A text of at most so many bytes.
    pub fn text(&self, var: &str, bytes_max: usize) -> Result<Option<&str>, StanzaError> {
        match self.one(var)? {
            Some(text) if text.len() > bytes_max => {
                Err(StanzaError::NOT_ACCEPTABLE.text("a field of the form is too long"))
            }
            text => Ok(text),
        }
    }

    /// The lines of a field of several, joined.
    pub fn lines(&self, var: &str, bytes_max: usize) -> Result<Option<String>, StanzaError> {
        let text = self.get(var).map(|lines| lines.join("\n"));
        match text {
            Some(text) if text.len() > bytes_max => {
                Err(StanzaError::NOT_ACCEPTABLE.text("a field of the form is too long"))
            }
            text => Ok(text),
        }
    }

    /// Not negative; a number beyond `u64` is an error.
    pub fn number(&self, var: &str) -> Result<Option<u64>, StanzaError> {
        self.one(var)?
            .filter(|text| !text.is_empty())
            .map(|text| {
                text.trim().parse().map_err(|_| {
                    StanzaError::NOT_ACCEPTABLE.text("a field of the form is no number")
                })
            })
            .transpose()
    }

    /// One of these, given back as the entry of `choices`.
    pub fn choice<'c, T>(
        &self,
        var: &str,
        choices: &'c [(&str, T)],
    ) -> Result<Option<&'c T>, StanzaError> {
        self.one(var)?
            .map(|text| {
                let found = choices.iter().find(|(name, _)| *name == text);
                found.map(|(_, choice)| choice).ok_or(
                    StanzaError::NOT_ACCEPTABLE.text("a field of the form has no such choice"),
                )
            })
            .transpose()
    }

    pub fn jid(&self, var: &str) -> Result<Option<Jid<'static>>, StanzaError> {
        self.one(var)?
            .filter(|text| !text.is_empty())
            .map(parse)
            .transpose()
    }

    /// Empty lines are left out, each address is there once.
    pub fn jids(&self, var: &str) -> Result<Option<Vec<Jid<'static>>>, StanzaError> {
        let Some(values) = self.get(var) else {
            return Ok(None);
        };
        let values = values.iter().map(|v| v.trim()).filter(|v| !v.is_empty());
        let mut jids = values.map(parse).collect::<Result<Vec<_>, _>>()?;
        jids.sort();
        jids.dedup();
        Ok(Some(jids))
    }
}

fn parse(text: &str) -> Result<Jid<'static>, StanzaError> {
    match Jid::parse(text.trim()) {
        Ok(jid) => Ok(jid.into_owned()),
        Err(_) => Err(StanzaError::NOT_ACCEPTABLE.text("a field of the form is no address")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn x(fields: &str) -> Element {
        Element::parse(&format!(
            "<x xmlns='jabber:x:data' type='submit'>{fields}</x>"
        ))
        .unwrap()
    }

    fn field(var: &str, values: &[&str]) -> String {
        let values: Vec<_> = values
            .iter()
            .map(|v| format!("<value>{v}</value>"))
            .collect();
        format!("<field var='{var}'>{}</field>", values.concat())
    }

    fn read(fields: &str) -> Result<Values, StanzaError> {
        Values::read(&x(fields), "urn:test")
    }

    #[test]
    fn a_form_shows_types_options_and_values() {
        let form = Form::new(Kind::Form, "urn:test")
            .title("T")
            .instructions("I")
            .field(Field::boolean("b", true).label("B").required())
            .field(
                Field::list("l", "two")
                    .option("One", "one")
                    .option("Two", "two"),
            )
            .field(Field::text("t", ""));
        assert_eq!(
            form.element().to_xml(""),
            "<x xmlns='jabber:x:data' type='form'><title>T</title><instructions>I</instructions>\
             <field var='FORM_TYPE' type='hidden'><value>urn:test</value></field>\
             <field var='b' type='boolean' label='B'><required/><value>1</value></field>\
             <field var='l' type='list-single'><value>two</value>\
             <option label='One'><value>one</value></option><option label='Two'><value>two</value></option></field>\
             <field var='t' type='text-single'/></x>"
        );
    }

    #[test]
    fn a_result_says_no_types_but_of_form_type() {
        let form = Form::new(Kind::Result, "urn:test").field(Field::jids("j", ["a@b", "c@d"]));
        assert_eq!(
            form.element().to_xml(""),
            "<x xmlns='jabber:x:data' type='result'><field var='FORM_TYPE' type='hidden'><value>urn:test</value></field>\
             <field var='j'><value>a@b</value><value>c@d</value></field></x>"
        );
    }

    #[test]
    fn values_are_read_as_what_they_are() {
        let fields = [
            field(FORM_TYPE, &["urn:test"]),
            field("yes", &["true"]),
            field("no", &["0"]),
            field("n", &["42"]),
            field("t", &["text"]),
            field("empty", &[""]),
            field("none", &[]),
            field("lines", &["a", "b"]),
            field(
                "jids",
                &["B@example.com", "a@example.com", "", "b@example.com"],
            ),
            "<field type='fixed'><value>for people</value></field>".to_owned(),
        ];
        let v = read(&fields.concat()).unwrap();
        assert_eq!(v.boolean("yes"), Ok(Some(true)));
        assert_eq!(v.boolean("no"), Ok(Some(false)));
        assert_eq!(v.boolean("none"), Ok(None));
        assert_eq!(v.number("n"), Ok(Some(42)));
        assert_eq!(v.text("t", 4), Ok(Some("text")));
        assert_eq!(v.text("empty", 4), Ok(Some("")));
        assert_eq!(v.text("none", 4), Ok(None));
        assert_eq!(v.text("absent", 4), Ok(None));
        assert_eq!(v.lines("lines", 9), Ok(Some("a\nb".to_owned())));
        let jids = v.jids("jids").unwrap().unwrap();
        let jids: Vec<_> = jids.iter().map(Jid::as_str).collect();
        assert_eq!(jids, ["a@example.com", "b@example.com"]);
        assert_eq!(v.jids("absent"), Ok(None));
        assert_eq!(v.choice("t", &[("x", 1), ("text", 2)]), Ok(Some(&2)));
    }

    #[test]
    fn a_value_that_does_not_fit_is_an_error_and_no_default() {
        let v = read(&[field("t", &["maybe"]), field("two", &["1", "0"])].concat()).unwrap();
        assert_eq!(v.boolean("t").unwrap_err().condition, "not-acceptable");
        assert_eq!(v.number("t").unwrap_err().condition, "not-acceptable");
        assert_eq!(v.text("t", 4).unwrap_err().condition, "not-acceptable");
        assert_eq!(v.lines("t", 4).unwrap_err().condition, "not-acceptable");
        assert_eq!(
            v.choice("t", &[("x", 1)]).unwrap_err().condition,
            "not-acceptable"
        );
        assert_eq!(v.boolean("two").unwrap_err().condition, "bad-request");
        let v = read(&field("j", &["@"])).unwrap();
        assert_eq!(v.jid("j").unwrap_err().condition, "not-acceptable");
        assert_eq!(v.jids("j").unwrap_err().condition, "not-acceptable");
    }

    #[test]
    fn forms_for_something_else_are_refused() {
        for fields in [
            field(FORM_TYPE, &["urn:other"]),
            [field("a", &["1"]), field("a", &["2"])].concat(),
            "<field><value>1</value></field>".to_owned(),
            (0..=FIELDS_MAX)
                .map(|n| field(&n.to_string(), &["1"]))
                .collect(),
        ] {
            assert_eq!(
                read(&fields).unwrap_err().condition,
                "bad-request",
                "{fields}"
            );
        }
        let mut form = x("");
        assert_eq!(
            Answer::read(&form, "urn:test"),
            Ok(Answer::Submitted(Values::default()))
        );
        form.set("type", "cancel");
        assert_eq!(Answer::read(&form, "urn:test"), Ok(Answer::Cancelled));
        form.set("type", "form");
        assert!(Answer::read(&form, "urn:test").is_err());
        let parent = Element::new("query", "urn:test");
        assert_eq!(Values::of(&parent, "urn:test"), Ok(None));
    }
}
