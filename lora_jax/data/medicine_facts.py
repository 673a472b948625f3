"""A small medical knowledge graph: textbook facts, each relation a function x -> y.

Distractors are drawn from the same relation, so a relation holds only pairs whose y
is not also true of another x of that relation with a different y. For training and
measuring models; not medical advice.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
  """One kind of fact.

  Attributes:
    subject: the field of medicine.
    facts: pairs (x, y); no x twice.
    statement: the fact as a sentence, with {x} and {y}.
    forward: questions that name x and ask for y.
    reverse: questions that name y and ask for x.
  """

  subject: str
  facts: tuple[tuple[str, str], ...]
  statement: str
  forward: tuple[str, ...]
  reverse: tuple[str, ...] = ()


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
  pairs = (pair.split('|') for pair in table.split(';'))
  return tuple((x.strip(), y.strip()) for x, y in pairs)


DEFICIENCY = Relation(
  'Nutrition',
  _pairs("""
    scurvy | vitamin C; beriberi | thiamine; pellagra | niacin; rickets | vitamin D;
    night blindness | vitamin A; endemic goitre | iodine;
    subacute combined degeneration of the cord | vitamin B12;
    neural tube defects of the fetus | folate; microcytic hypochromic anaemia | iron;
    haemorrhagic disease of the newborn | vitamin K; acrodermatitis enteropathica | zinc;
    Keshan cardiomyopathy | selenium; magenta tongue with angular stomatitis | riboflavin
  """),
  'Lack of {y} causes {x}.',
  (
    'Lack of which nutrient causes {x}?',
    'Which nutrient treats and prevents {x}?',
    'A patient has {x}. Which nutrient is low?',
  ),
  (
    'Which condition follows from lack of {y}?',
    'A diet without {y} leads to which condition?',
  ),
)

NUTRIENT_ROLE = Relation(
  'Biochemistry',
  _pairs("""
    vitamin C | hydroxylation of proline in collagen;
    thiamine | cofactor of pyruvate dehydrogenase; niacin | part of NAD and NADP;
    vitamin D | calcium absorption in the gut; vitamin A | making of rhodopsin in the retina;
    iodine | making of thyroid hormone;
    vitamin B12 | conversion of methylmalonyl-CoA to succinyl-CoA;
    folate | one-carbon transfer for thymidine; iron | oxygen binding in haem;
    vitamin K | gamma-carboxylation of clotting factors; zinc | cofactor of carbonic anhydrase;
    selenium | cofactor of glutathione peroxidase; riboflavin | part of FAD
  """),
  'The role of {x} is: {y}.',
  ('What is the role of {x} in the body?', 'For what does the body need {x}?'),
  ('Which nutrient has this role: {y}?', 'This is the work of which nutrient: {y}?'),
)

ORGANISM = Relation(
  'Microbiology',
  _pairs("""
    tuberculosis | Mycobacterium tuberculosis; syphilis | Treponema pallidum;
    Lyme disease | Borrelia burgdorferi; cholera | Vibrio cholerae;
    typhoid fever | Salmonella Typhi; plague | Yersinia pestis;
    Legionnaires' disease | Legionella pneumophila; cat scratch disease | Bartonella henselae;
    diphtheria | Corynebacterium diphtheriae; tetanus | Clostridium tetani;
    anthrax | Bacillus anthracis; scarlet fever | Streptococcus pyogenes;
    bullous impetigo | Staphylococcus aureus; gonorrhoea | Neisseria gonorrhoeae;
    kala-azar | Leishmania donovani; Chagas disease | Trypanosoma cruzi;
    African sleeping sickness | Trypanosoma brucei; hydatid cyst | Echinococcus granulosus;
    bancroftian elephantiasis | Wuchereria bancrofti
  """),
  '{x} is caused by {y}.',
  (
    'Which organism causes {x}?',
    'The agent of {x} is',
    'Samples from a patient with {x} would show which organism?',
  ),
  ('Which disease is caused by {y}?', 'Infection with {y} leads to'),
)

ORGANISM_KIND = Relation(
  'Microbiology',
  _pairs("""
    Mycobacterium tuberculosis | acid-fast rod; Treponema pallidum | spirochaete;
    Borrelia burgdorferi | spirochaete; Vibrio cholerae | gram-negative rod;
    Salmonella Typhi | gram-negative rod; Yersinia pestis | gram-negative rod;
    Legionella pneumophila | gram-negative rod; Bartonella henselae | gram-negative rod;
    Corynebacterium diphtheriae | gram-positive rod; Clostridium tetani | gram-positive rod;
    Bacillus anthracis | gram-positive rod; Streptococcus pyogenes | gram-positive coccus;
    Staphylococcus aureus | gram-positive coccus; Neisseria gonorrhoeae | gram-negative coccus;
    Leishmania donovani | protozoan; Trypanosoma cruzi | protozoan;
    Trypanosoma brucei | protozoan; Echinococcus granulosus | parasitic worm;
    Wuchereria bancrofti | parasitic worm
  """),
  '{x} is a {y}.',
  ('What kind of organism is {x}?', '{x} is best described as a'),
)

DRUG_CLASS = Relation(
  'Pharmacology',
  _pairs("""
    atenolol | beta blocker; enalapril | ACE inhibitor; losartan | angiotensin receptor blocker;
    amlodipine | calcium channel blocker; furosemide | loop diuretic;
    hydrochlorothiazide | thiazide diuretic; spironolactone | aldosterone antagonist;
    simvastatin | statin; omeprazole | proton pump inhibitor; famotidine | H2 blocker;
    ondansetron | 5-HT3 antagonist; fluoxetine | SSRI; metformin | biguanide;
    glibenclamide | sulfonylurea; pioglitazone | thiazolidinedione;
    sitagliptin | DPP-4 inhibitor; empagliflozin | SGLT2 inhibitor; digoxin | cardiac glycoside;
    salbutamol | beta-2 agonist; amoxicillin | penicillin; ciprofloxacin | fluoroquinolone;
    azithromycin | macrolide; gentamicin | aminoglycoside; doxycycline | tetracycline;
    fluconazole | azole antifungal; diazepam | benzodiazepine; morphine | opioid;
    haloperidol | typical antipsychotic
  """),
  '{x} belongs to the class {y}.',
  (
    'To which drug class does {x} belong?',
    'A patient takes {x}. What class of drug is it?',
    'The class of {x} is',
  ),
  ('Which of these drugs belongs to the class {y}?', 'An example of the class {y} is'),
)

CLASS_ACTION = Relation(
  'Pharmacology',
  _pairs("""
    beta blocker | blocks beta adrenoceptors; ACE inhibitor | stops formation of angiotensin II;
    angiotensin receptor blocker | blocks the AT1 receptor;
    calcium channel blocker | blocks L-type calcium channels;
    loop diuretic | blocks the Na-K-2Cl cotransporter;
    thiazide diuretic | blocks the Na-Cl cotransporter;
    aldosterone antagonist | blocks the mineralocorticoid receptor;
    statin | inhibits HMG-CoA reductase; proton pump inhibitor | inhibits gastric H+/K+ ATPase;
    H2 blocker | blocks histamine H2 receptors;
    5-HT3 antagonist | blocks serotonin 5-HT3 receptors; SSRI | blocks reuptake of serotonin;
    biguanide | lowers glucose output of the liver;
    sulfonylurea | closes potassium channels of beta cells;
    thiazolidinedione | activates PPAR-gamma; DPP-4 inhibitor | slows the breakdown of incretins;
    SGLT2 inhibitor | blocks glucose reabsorption in the kidney;
    cardiac glycoside | inhibits Na+/K+ ATPase;
    beta-2 agonist | relaxes bronchial muscle through cyclic AMP;
    penicillin | blocks cross-linking of the cell wall; fluoroquinolone | inhibits DNA gyrase;
    macrolide | binds the 50S ribosomal subunit;
    aminoglycoside | makes the 30S subunit misread mRNA;
    tetracycline | keeps tRNA off the 30S subunit;
    azole antifungal | inhibits ergosterol synthesis; benzodiazepine | enhances GABA-A receptors;
    opioid | activates mu receptors; typical antipsychotic | blocks dopamine D2 receptors
  """),
  'A drug of the class {x} {y}.',
  ('How does a drug of the class {x} act?', 'What does a drug of the class {x} do?'),
  ('Which drug class {y}?', 'A drug that {y} belongs to which class?'),
)

CLASS_HARM = Relation(
  'Pharmacology',
  _pairs("""
    ACE inhibitor | dry cough; statin | muscle pain with raised creatine kinase;
    aminoglycoside | damage to the inner ear and kidney; fluoroquinolone | tendon rupture;
    tetracycline | stained teeth in children; biguanide | lactic acidosis;
    sulfonylurea | hypoglycaemia; aldosterone antagonist | high potassium with gynaecomastia;
    SGLT2 inhibitor | genital thrush; calcium channel blocker | ankle swelling;
    typical antipsychotic | tardive dyskinesia; cardiac glycoside | yellow vision;
    opioid | constipation with pinpoint pupils
  """),
  'A typical harm of the class {x} is {y}.',
  ('Which harm is typical of the class {x}?',),
  ('Which drug class is known for causing {y}?',),
)

ENZYME = Relation(
  'Biochemistry',
  _pairs("""
    phenylketonuria | phenylalanine hydroxylase; Gaucher disease | glucocerebrosidase;
    Tay-Sachs disease | hexosaminidase A; Pompe disease | lysosomal acid alpha-glucosidase;
    Fabry disease | alpha-galactosidase A; Niemann-Pick disease type A | sphingomyelinase;
    Krabbe disease | galactocerebrosidase; alkaptonuria | homogentisate oxidase;
    Lesch-Nyhan syndrome | HGPRT;
    classic galactosaemia | galactose-1-phosphate uridyltransferase;
    maple syrup urine disease | branched-chain keto acid dehydrogenase;
    von Gierke disease | glucose-6-phosphatase; McArdle disease | muscle glycogen phosphorylase;
    oculocutaneous albinism type 1 | tyrosinase
  """),
  '{x} is due to lack of {y}.',
  (
    'Which enzyme is deficient in {x}?',
    '{x} is due to lack of',
    'An infant is found to have {x}. Which enzyme does not work?',
  ),
  ('Which disease follows from lack of {y}?', 'A defect of {y} causes'),
)

ENZYME_STORE = Relation(
  'Biochemistry',
  _pairs("""
    phenylalanine hydroxylase | phenylalanine; glucocerebrosidase | glucocerebroside;
    hexosaminidase A | GM2 ganglioside; lysosomal acid alpha-glucosidase | lysosomal glycogen;
    alpha-galactosidase A | globotriaosylceramide; sphingomyelinase | sphingomyelin;
    galactocerebrosidase | galactocerebroside; homogentisate oxidase | homogentisic acid;
    HGPRT | uric acid; galactose-1-phosphate uridyltransferase | galactose-1-phosphate;
    branched-chain keto acid dehydrogenase | leucine and its keto acid
  """),
  'Without {x}, {y} accumulates.',
  ('What accumulates when {x} does not work?',),
  ('A defect of which enzyme makes {y} accumulate?',),
)

ANTIDOTE = Relation(
  'Toxicology',
  _pairs("""
    paracetamol poisoning | acetylcysteine; opioid overdose | naloxone;
    benzodiazepine overdose | flumazenil; iron poisoning | desferrioxamine;
    methanol poisoning | fomepizole; cyanide poisoning | hydroxocobalamin;
    carbon monoxide poisoning | high-flow oxygen; warfarin overdose | vitamin K;
    heparin overdose | protamine; dabigatran bleeding | idarucizumab;
    methotrexate toxicity | folinic acid; organophosphate poisoning | atropine;
    beta blocker overdose | glucagon
  """),
  '{x} is treated with {y}.',
  (
    'What is the antidote for {x}?',
    'A patient is brought in with {x}. Which antidote is given?',
    'Which agent reverses {x}?',
  ),
  ('For what is {y} the antidote?', 'A doctor gives {y} as an antidote. The patient has'),
)

ANTIDOTE_ACTION = Relation(
  'Toxicology',
  _pairs("""
    acetylcysteine | restores glutathione in the liver; naloxone | competes at mu receptors;
    flumazenil | competes at the GABA-A receptor; desferrioxamine | chelates iron;
    fomepizole | inhibits alcohol dehydrogenase; hydroxocobalamin | binds cyanide;
    high-flow oxygen | displaces carbon monoxide from haemoglobin;
    vitamin K | restores carboxylation of clotting factors;
    protamine | neutralises heparin by charge; idarucizumab | binds dabigatran;
    folinic acid | bypasses dihydrofolate reductase; atropine | blocks muscarinic receptors;
    glucagon | raises cyclic AMP in the heart without beta receptors
  """),
  '{x} {y}.',
  ('How does {x} work as an antidote?',),
  ('Which antidote {y}?',),
)

ANTIBODY = Relation(
  'Immunology',
  _pairs("""
    Graves disease | TSH receptor antibody; myasthenia gravis | acetylcholine receptor antibody;
    Lambert-Eaton syndrome | calcium channel antibody;
    primary biliary cholangitis | antimitochondrial antibody;
    coeliac disease | tissue transglutaminase antibody;
    Goodpasture disease | basement membrane antibody;
    pernicious anaemia | intrinsic factor antibody; pemphigus vulgaris | desmoglein antibody;
    limited systemic sclerosis | anticentromere antibody;
    rheumatoid arthritis | anti-CCP antibody;
    systemic lupus erythematosus | anti-double-stranded DNA antibody;
    granulomatosis with polyangiitis | proteinase 3 antibody
  """),
  '{x} is marked by {y}.',
  ('Which antibody marks {x}?', 'In suspected {x}, which test is most specific?'),
  ('{y} points to which disease?', 'A blood test finds {y}. The likely disease is'),
)

MARKER = Relation(
  'Oncology',
  _pairs("""
    hepatocellular carcinoma | alpha-fetoprotein; prostate cancer | prostate-specific antigen;
    epithelial ovarian cancer | CA 125; pancreatic cancer | CA 19-9;
    medullary thyroid cancer | calcitonin; choriocarcinoma | beta-hCG;
    phaeochromocytoma | plasma metanephrines; carcinoid tumour | urinary 5-HIAA;
    multiple myeloma | serum paraprotein
  """),
  '{x} is followed with {y}.',
  ('Which marker is used to follow {x}?', 'The tumour marker of {x} is'),
  ('{y} is the marker of which tumour?',),
)

NERVE = Relation(
  'Anatomy',
  _pairs("""
    wrist drop | radial nerve; claw hand | ulnar nerve; foot drop | common peroneal nerve;
    winging of the scapula | long thoracic nerve; loss of thumb opposition | median nerve;
    deltoid paralysis | axillary nerve; weak adduction of the hip | obturator nerve;
    weak extension of the knee | femoral nerve; Trendelenburg gait | superior gluteal nerve;
    weak elbow flexion | musculocutaneous nerve
  """),
  '{x} follows injury of the {y}.',
  ('Injury of which nerve causes {x}?', 'A patient shows {x}. Which nerve is damaged?'),
  ('Which sign follows injury of the {y}?',),
)

FINDING = Relation(
  'Pathology',
  _pairs("""
    Koplik spots | measles; Reed-Sternberg cells | Hodgkin lymphoma;
    Auer rods | acute myeloid leukaemia; Kayser-Fleischer rings | Wilson disease;
    Negri bodies | rabies; Lewy bodies | Parkinson disease; Aschoff bodies | rheumatic fever;
    the Philadelphia chromosome | chronic myeloid leukaemia; Heinz bodies | G6PD deficiency;
    Brushfield spots | Down syndrome; Janeway lesions | infective endocarditis;
    a heliotrope rash | dermatomyositis; Curschmann spirals | asthma;
    plexiform neurofibromas | neurofibromatosis type 1
  """),
  'One looks for {x} in {y}.',
  ('{x} would suggest which disease?', 'Which disease goes with {x}?'),
  ('Which finding is typical of {y}?', 'In {y} one looks for'),
)

HORMONE = Relation(
  'Physiology',
  _pairs("""
    insulin | beta cells of the pancreas; glucagon | alpha cells of the pancreas;
    aldosterone | zona glomerulosa; cortisol | zona fasciculata; adrenaline | adrenal medulla;
    calcitonin | parafollicular cells of the thyroid; parathyroid hormone | chief cells;
    prolactin | anterior pituitary; melatonin | pineal gland; renin | juxtaglomerular cells;
    gastrin | G cells of the stomach; secretin | S cells of the duodenum;
    testosterone | Leydig cells; inhibin | Sertoli cells
  """),
  '{x} comes from the {y}.',
  ('Where is {x} made?', 'Which cells or tissue secrete {x}?'),
  ('What is secreted by the {y}?',),
)

RELATIONS = (
  DEFICIENCY,
  NUTRIENT_ROLE,
  ORGANISM,
  ORGANISM_KIND,
  DRUG_CLASS,
  CLASS_ACTION,
  CLASS_HARM,
  ENZYME,
  ENZYME_STORE,
  ANTIDOTE,
  ANTIDOTE_ACTION,
  ANTIBODY,
  MARKER,
  NERVE,
  FINDING,
  HORMONE,
)
